"""Losses of guided teachers, whose explanations are trained to be on the object (Rao et al. 2023, "Model Guidance")."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.teaching import GuidedTeachingConfig
from permafrost.core.batches import Guidance, Targets
from permafrost.losses.base import Needs, StudentOutput, Term, TermValue
from permafrost.losses.labels import LabelsLoss

MIN_ENERGY = 1e-7
"""Minimum positive mass of a map. The EPG of a map with less is 0."""
_TINY = torch.finfo(torch.float32).tiny


def energy_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """1 - the share of positive attributions inside the region, [n], or 1 - their sum inside if their total is ~0.

    attributions  f32 [n, H, W], signed
    regions       bool [n, H, W]
    """
    positive = attributions.clamp(min=0)
    total, inside = positive.sum(dim=(1, 2)), (positive * regions).sum(dim=(1, 2))
    weak = total < MIN_ENERGY
    return 1 - torch.where(weak, inside, inside / torch.where(weak, 1.0, total))


def l1_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Mean absolute difference of the positive attributions, scaled to a maximum of 1, from the region's mask, [n]."""
    return (_unit(attributions.clamp(min=0)) - regions.float()).abs().mean(dim=(1, 2))


def rrr_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Sum of the squared, scaled attributions outside the region (RRR, Ross et al. 2017), [n]."""
    return ((_unit(attributions) * ~regions) ** 2).sum(dim=(1, 2))


def ppce_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Mean cross-entropy to 1 of the positive attributions inside the region, scaled to a maximum of 1, [n]."""
    positive = _unit(attributions.clamp(min=0))
    per_pixel = F.binary_cross_entropy(positive, torch.ones_like(positive), reduction="none")
    return (per_pixel * regions).sum(dim=(1, 2)) / regions.sum(dim=(1, 2)).clamp(min=1)


def _unit(attributions: Tensor) -> Tensor:
    """Divide attributions by their largest absolute value."""
    return attributions / attributions.abs().amax(dim=(1, 2), keepdim=True).clamp(min=_TINY)


LOCALIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy": energy_loss,
    "l1": l1_loss,
    "rrr": rrr_loss,
    "ppce": ppce_loss,
}


class GuidedLoss(LabelsLoss):
    """Loss of the labels + lambda_localization * sum over the batch of one of LOCALIZATIONS.

    It is a sum, not a mean, as in the source, so that published values of lambda apply, with any number of ranks. The
    attributions of a B-cos network are its contributions, those of others GradCAM, upsampled to the input.
    """

    config: GuidedTeachingConfig

    @property
    def needs(self) -> Needs:
        maps_every = 1 if self.config.lambda_localization > 0 else None
        return Needs(labels=True, maps_every=maps_every)

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        yield from super().terms(student, None, labels)
        if (maps := student.maps) is not None:
            assert isinstance(targets, Guidance)
            yield Term(
                "localization",
                self.config.lambda_localization,
                lambda: self._localization(maps, targets.regions, student.input_size),
            )

    def _localization(
        self, maps: Tensor, regions: Tensor, input_size: tuple[int, int]
    ) -> TermValue:
        guided = regions.flatten(1).any(dim=1)
        attributions = F.interpolate(
            maps[:, 0].float(), input_size, mode="bilinear", align_corners=False
        )[:, 0]
        losses = LOCALIZATIONS[self.config.localization](attributions, regions)
        # The sum is over the whole batch, but averaging gradients over ranks divides by the world size.
        total = torch.where(guided, losses, 0.0).sum() * self.distributed.world_size
        return TermValue(total, {"guided_fraction": guided.float().mean()})
