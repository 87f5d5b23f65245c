"""Chimeras: inputs whose superfeatures come from different records, and the teacher's logits for them.

If each subnet receives only its own part of the input, the logits of a superfeature are exactly those of its donor, so
a chimera needs no forward pass of the teacher. This does not hold for a trunk, whose cells depend on their
surroundings.
Shape letters: B batch, n chimeras, M superfeatures, K classes, d features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permafrost.core.batches import Batch, Targets, require_all_logits
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import StepInputs
from permafrost_papers.ked.subnets import LOGITS


def mix_rows(superfeature_logits: Tensor, donors: Tensor) -> Tensor:
    """Select the logits of each superfeature from its donor.

    Args:
        superfeature_logits: [B, M, K].
        donors: i64 [n, M], the record of each superfeature.

    Returns:
        [n, M, K].
    """
    return superfeature_logits[donors, torch.arange(donors.shape[1], device=donors.device)]


def mix_inputs(
    inputs: Tensor, assignment: Tensor, donors: Tensor, grid: tuple[int, int] | None
) -> Tensor:
    """Compose inputs [B, ...] -> [n, ...], with each feature taken from the donor of its superfeature.

    Args:
        inputs: [B, C, H, W] with sides that are multiples of the grid's, or table rows [B, d].
        assignment: i64 [d], the superfeature of each cell or column.
        donors: i64 [n, M], the record of each superfeature.
        grid: (rows, columns) of the cells, None for a table.
    """
    donor_of_feature = donors[:, assignment.to(donors.device)]  # [n, d]
    if grid is None:
        return inputs.gather(0, donor_of_feature)
    pixels = spread_cells(donor_of_feature.view(-1, *grid), (inputs.shape[2], inputs.shape[3]))
    return inputs.gather(0, pixels[:, None].expand(-1, inputs.shape[1], -1, -1))


def spread_cells(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Expand cells to pixels with the value of their cell.

    Args:
        cells: [..., rows, columns].
        size: (height, width) in pixels, multiples of rows and columns.

    Returns:
        [..., height, width].
    """
    rows, columns = cells.shape[-2:]
    return cells.repeat_interleave(size[0] // rows, dim=-2).repeat_interleave(
        size[1] // columns, dim=-1
    )


@dataclass(frozen=True, kw_only=True)
class Chimeras:
    """Chimeras: records added to a batch, with each superfeature taken from an independently drawn record (KED).

    Shape letters: B batch, n chimeras, M superfeatures of the compared level, K classes, d features.
    """

    fraction: float
    """Number n of chimeras as a fraction of B."""
    number: int
    """Number M of superfeatures."""
    assignment: Tensor
    """Superfeature of each of the student's features, i64 [d]."""
    grid: tuple[int, int] | None

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        images = inputs.images
        assert isinstance(inputs.labels, Tensor)
        count = round(self.fraction * len(images))
        donors = torch.randint(len(images), (count, self.number), device=images.device)
        return replace(
            inputs,
            images=torch.cat([images, mix_inputs(images, self.assignment, donors, self.grid)]),
            # Chimeras have no correct label.
            labels=torch.cat([inputs.labels, inputs.labels.new_full((count,), NO_LABEL)]),
            on_targets=(*inputs.on_targets, lambda targets: add_chimeras(targets, donors)),
        )


def add_chimeras(targets: Targets, donors: Tensor) -> Targets:
    """Append the targets of chimeras to those of a batch. Their logits are the sum of those of their parts.

    Args:
        targets: Targets with superfeature logits [B, M, K] at the compared level.
        donors: i64 [n, M], the record of each superfeature.

    Raises:
        ConfigError: If only the largest logits are stored.
    """
    intermediates = {
        name: torch.cat([values, mix_rows(values, donors)])
        for name, values in targets.intermediates.items()
    }
    logits = require_all_logits(targets.logits, "method.chimera_fraction")
    mixed = intermediates[LOGITS][len(logits) :].sum(dim=1)
    return replace(targets, logits=torch.cat([logits, mixed]), intermediates=intermediates)
