"""Guided teachers: right, and for reasons that lie on the object (Rao et al. 2023, "Model Guidance")."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.teaching import GuidedTeachingConfig
from pipeline.core.records import Guidance, Targets
from pipeline.losses.base import Needs, StudentOutput, Term, TermValue
from pipeline.losses.labels import LabelsLoss

MIN_ENERGY = 1e-7
"""A map with less positive mass than this points nowhere; EPG counts it as 0."""
_TINY = torch.finfo(torch.float32).tiny


def energy_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """1 - the share of the positive attributions that lies inside, [n]; 1 - their sum inside where there are none.

    attributions  f32 [n, H, W], signed
    regions       bool [n, H, W]
    """
    positive = attributions.clamp(min=0)
    total, inside = positive.sum(dim=(1, 2)), (positive * regions).sum(dim=(1, 2))
    weak = total < MIN_ENERGY
    return 1 - torch.where(weak, inside, inside / torch.where(weak, 1.0, total))


def l1_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Mean distance of the positive attributions, scaled to a maximum of 1, from the region itself, [n]."""
    return (_unit(attributions.clamp(min=0)) - regions.float()).abs().mean(dim=(1, 2))


def rrr_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Sum of the squared attributions outside (right for the right reasons, Ross et al. 2017), scaled, [n]."""
    return ((_unit(attributions) * ~regions) ** 2).sum(dim=(1, 2))


def ppce_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Mean cross-entropy of the positive attributions inside, scaled to a maximum of 1, to 1, [n]."""
    positive = _unit(attributions.clamp(min=0))
    per_pixel = F.binary_cross_entropy(positive, torch.ones_like(positive), reduction="none")
    return (per_pixel * regions).sum(dim=(1, 2)) / regions.sum(dim=(1, 2)).clamp(min=1)


def _unit(attributions: Tensor) -> Tensor:
    """Divided by the largest absolute value."""
    return attributions / attributions.abs().amax(dim=(1, 2), keepdim=True).clamp(min=_TINY)


LOCALIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy": energy_loss,
    "l1": l1_loss,
    "rrr": rrr_loss,
    "ppce": ppce_loss,
}


class GuidedLoss(LabelsLoss):
    """The labels' loss + lambda_localization * sum over the batch of one of LOCALIZATIONS.

    The sum, not the mean: as in the source, so that a published lambda keeps its meaning, with any number of
    ranks. Of a B-cos network
    the attributions are its contributions, of others GradCAM, upsampled to the input.
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
        # A sum over the whole batch; of several ranks the gradients are averaged, which divides it.
        total = torch.where(guided, losses, 0.0).sum() * self.distributed.world_size
        return TermValue(total, {"guided_fraction": guided.float().mean()})
