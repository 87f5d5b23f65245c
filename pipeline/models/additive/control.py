"""Partitions that know nothing of the network: what one that does is compared with."""

from __future__ import annotations

import torch

from pipeline.core.seeds import derive_seed
from pipeline.models.additive.partition import Partition


def random_partition(like: Partition, seed: int = 0) -> Partition:
    """Groups of the same sizes, nested the same way, of features drawn at random."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "random partition"))
    order = torch.randperm(like.assignments.shape[1], generator=generator)
    return Partition(assignments=like.assignments[:, order], grid=like.grid)


def contiguous_partition(
    number: int, num_features: int, grid: tuple[int, int] | None = None
) -> Partition:
    """`number` groups of neighbours: rectangles of the grid, or runs of a table's columns.

    From the whole on, the largest rectangle (of equal ones the first) is cut across its longer side.
    """
    if number > num_features:
        raise ValueError(f"{num_features} features have no {number} groups")
    blocks = [torch.arange(num_features).view(grid or (1, num_features))]
    assignments = torch.zeros(number, num_features, dtype=torch.int64)
    for level in range(1, number):
        largest = max(blocks, key=torch.numel)
        side = int(largest.shape[1] >= largest.shape[0])
        near, far = largest.tensor_split(2, dim=side)
        blocks = [b for b in blocks if b is not largest] + [near, far]
        blocks.sort(key=lambda block: int(block[0, 0]))
        for group, block in enumerate(blocks):
            assignments[level, block.flatten()] = group
    return Partition(assignments=assignments, grid=grid)
