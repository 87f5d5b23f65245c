"""Chimeras: inputs whose superfeatures come from different records, and what the teacher says of them.

Where subnets see nothing but their own part of the input, the logits of a superfeature are its donor's, exactly:
a chimera costs no call of the teacher. Through a trunk, whose cells see their surroundings, they are not.
Shape letters: B batch, n chimeras, M superfeatures, K classes, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_donors(number: int, records: int, superfeatures: int, device: torch.device) -> Tensor:
    """Of each superfeature of `number` chimeras the record it comes from, i64 [n, M], by torch's generator."""
    return torch.randint(records, (number, superfeatures), device=device)


def mix_rows(superfeature_logits: Tensor, donors: Tensor) -> Tensor:
    """[B, M, K] and donors i64 [n, M] -> [n, M, K]: of each superfeature its donor's."""
    places = torch.arange(donors.shape[1], device=donors.device)
    return superfeature_logits[donors, places]


def mix_inputs(
    inputs: Tensor, assignment: Tensor, donors: Tensor, grid: tuple[int, int] | None
) -> Tensor:
    """[B, ...] -> [n, ...]: of each feature its superfeature's donor's.

    inputs      [B, C, H, W], its sides multiples of the grid's, or table rows [B, d]
    assignment  i64 [d]: the superfeature of each cell or column
    donors      i64 [n, M]: the record of each superfeature
    grid        (rows, columns) of the cells; None for a table
    """
    donor_of_feature = donors[:, assignment.to(donors.device)]  # [n, d]
    if grid is None:
        return inputs.gather(0, donor_of_feature)
    pixels = spread_cells(donor_of_feature.view(-1, *grid), (inputs.shape[2], inputs.shape[3]))
    index = pixels[:, None].expand(-1, inputs.shape[1], -1, -1)
    return inputs.gather(0, index)


def spread_cells(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., rows, columns] -> [..., height, width]: each pixel has its cell's value."""
    rows, columns = cells.shape[-2:]
    return cells.repeat_interleave(size[0] // rows, dim=-2).repeat_interleave(
        size[1] // columns, dim=-1
    )
