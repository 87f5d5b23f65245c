"""Losses of guided teachers, whose explanations are trained to be on the object (Rao et al. 2023, "Model Guidance")."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.teaching import GuidedTeachingConfig
from permafrost.core.batches import AnyLabels, Guidance, Targets
from permafrost.losses.base import Needs, StudentOutput, Term, TermValue
from permafrost.losses.labels import LabelsLoss
from permafrost.losses.map_distances import LOCALIZATIONS


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
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: AnyLabels
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
