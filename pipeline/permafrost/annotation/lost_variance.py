"""Fraction of the variance of a teacher's features of a view that the stored ones, warped to it, miss (1 - R^2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.teacher_fields import project_features, stage_fields
from permafrost.core.batches import Targets
from permafrost.models.classifier import ModelOutput
from permafrost.store.projections import Projection


@dataclass
class LostVariance:
    """Sums over the covered cells of one stage, for the fraction of the variance that is lost."""

    error: float = 0.0
    squares: float = 0.0
    products: float = 0.0
    stored_squares: float = 0.0
    cells: float = 0.0
    by_channel: Tensor | float = 0.0

    def add(self, stored: Tensor, recomputed: Tensor, coverage: Tensor) -> None:
        """Add the features of a view.

        Args:
            stored: Stored features, warped to the view, [n, C, h, w].
            recomputed: Features of the teacher in the view, [n, C, h, w].
            coverage: [n, 1, h, w] in [0, 1], the weight of each cell.
        """
        stored, recomputed, coverage = stored.double(), recomputed.double(), coverage.double()
        self.error += float(((stored - recomputed).square() * coverage).sum())
        self.squares += float((recomputed.square() * coverage).sum())
        self.stored_squares += float((stored.square() * coverage).sum())
        self.products += float((stored * recomputed * coverage).sum())
        self.cells += float(coverage.sum())
        self.by_channel = self.by_channel + (recomputed * coverage).sum(dim=(0, 2, 3)).cpu()

    def share(self) -> float:
        """Return 1 - R^2, around the mean of each channel."""
        assert isinstance(self.by_channel, Tensor)
        spread = self.squares - float(self.by_channel.square().sum()) / max(self.cells, _TINY)
        return self.error / max(spread, _TINY)

    def cosine(self) -> float:
        """Return the cosine of both over all covered cells and channels."""
        return self.products / max(math.sqrt(self.squares * self.stored_squares), _TINY)


_TINY = 1e-30
"""Divisor for features that are constant, or covered nowhere."""


def add_lost_variance(
    sums: dict[str, LostVariance],
    targets: Targets,
    output: ModelOutput,
    projections: Mapping[str, Projection],
) -> None:
    """Add a batch to the sums of each stage that the pass stores.

    Args:
        sums: Sums by field; new fields are added.
        targets: Stored features, warped to a view.
        output: Teacher's output of that view, with its stages.
        projections: Projections of the fields of the pass, in whose components these are compared.
    """
    recomputed = stage_fields(output)
    for name, values in targets.intermediates.items():
        if values.dim() != 4:
            continue
        computed = (
            project_features(recomputed[name], projections[name])
            if name in projections
            else recomputed[name]
        )
        if values.shape != computed.shape:  # of a pass with annotate.features_size
            computed = F.adaptive_avg_pool2d(computed, (values.shape[-2], values.shape[-1]))
        coverage = targets.coverage.get(name, torch.ones_like(values[:, :1]))
        sums.setdefault(name, LostVariance()).add(values, computed, coverage)
