"""The partition that a network's options name: one that was found, contiguous blocks, or a random control.

Shape letters as in partition.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import ConfigError, require
from pipeline.superfeatures.partition import Partition

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import AdditiveModelConfig

PARTITION_NAME = "partition.safetensors"
"""In the folder of a partition artefact; holds `assignments`."""


def build_partition(config: AdditiveModelConfig) -> Partition:
    """M levels over the config's features; ConfigError where its file does not fit."""
    grid = None if config.columns else config.grid
    if config.partition is None or config.partition_control == "contiguous":
        found = contiguous_partition(config.superfeatures, grid or (1, config.features))
    else:
        found = _read_assignments(Path(config.partition), config)
    if config.partition_control == "random":
        generator = torch.Generator().manual_seed(config.partition_seed)
        found = found[:, torch.randperm(config.features, generator=generator)]
    return Partition(assignments=found, grid=grid)


def contiguous_partition(number: int, grid: tuple[int, int]) -> Tensor:
    """Blocks of an i64 [M, d] hierarchy: each level halves the largest block of the coarser one.

    The longer side is cut; of equal ones the first, so that four superfeatures of a square are its quarters.
    """
    rows, columns = grid
    level = torch.zeros(rows, columns, dtype=torch.int64)
    blocks = [(0, rows, 0, columns)]
    levels = [level.clone()]
    for new in range(1, number):
        sizes = [(bottom - top) * (right - left) for top, bottom, left, right in blocks]
        halved = sizes.index(max(sizes))
        top, bottom, left, right = blocks[halved]
        if bottom - top >= right - left:
            middle = (top + bottom) // 2
            halves = (top, middle, left, right), (middle, bottom, left, right)
        else:
            middle = (left + right) // 2
            halves = (top, bottom, left, middle), (top, bottom, middle, right)
        blocks[halved] = halves[0]
        blocks.append(halves[1])
        top, bottom, left, right = halves[1]
        level[top:bottom, left:right] = new
        levels.append(level.clone())
    return torch.stack(levels).flatten(1)


def _read_assignments(path: Path, config: AdditiveModelConfig) -> Tensor:
    """i64 [M, d] of an artefact that may have finer levels, too."""
    from safetensors.torch import load_file

    file = path / PARTITION_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"partition={path} holds no {PARTITION_NAME}; find a partition first, correct the path, or set "
            "partition=null for contiguous blocks (the weights of a trained network hold its own)"
        )
    tensors = load_file(file)
    require(
        "assignments" in tensors and tensors["assignments"].dtype == torch.int64,
        f"{file} holds no i64 tensor `assignments`, which a partition consists of; correct partition=",
    )
    assignments = tensors["assignments"]
    most, features = assignments.shape
    require(
        features == config.features,
        f"{file} groups {features} features, and the network has {config.features}: set grid=[rows, columns] (or "
        "columns= of a table) to the partition's own",
    )
    require(
        config.superfeatures <= most,
        f"{file} has up to {most} superfeatures, not superfeatures={config.superfeatures}; lower it, or find a finer "
        "partition",
    )
    return assignments[: config.superfeatures]
