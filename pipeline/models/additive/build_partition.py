"""The partition that a network's options name: one that was found, contiguous blocks, or a random control.

Shape letters as in partition.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.models import AdditiveModelConfig
from pipeline.core.errors import ConfigError, require
from pipeline.models.additive.control import contiguous_partition, random_partition
from pipeline.models.additive.partition import PARTITION_NAME, Partition
from pipeline.store.artifacts import load_artifact
from pipeline.store.manifest import MANIFEST_NAME


def build_partition(config: AdditiveModelConfig) -> Partition:
    """M levels over the config's features; ConfigError where its file does not fit.

    Where weights are named they hold the partition, whose file is then not read.
    """
    grid = None if config.columns else config.grid
    is_named = config.partition is not None and config.weights in (None, "random")
    if not is_named or config.partition_control == "contiguous":
        found = contiguous_partition(config.superfeatures, config.features, grid)
    else:
        assert config.partition is not None
        found = Partition(assignments=_read_assignments(Path(config.partition), config), grid=grid)
    if config.partition_control == "random":
        return random_partition(found, config.partition_seed)
    return found


def _read_assignments(path: Path, config: AdditiveModelConfig) -> Tensor:
    """i64 [M, d] of an artifact that may have finer levels, too."""
    from safetensors.torch import load_file

    file = path / PARTITION_NAME if path.is_dir() else path
    if (path / MANIFEST_NAME).is_file():
        load_artifact(path, "stages.teach with teaching=ked")  # ManifestError where it is damaged
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
