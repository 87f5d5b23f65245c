"""A partition on disk: <store>/artefacts/partition-<fp8>/ with manifest.json and partition.safetensors.

Shape letters: d features, M superfeatures.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import networkx
import torch

from pipeline.runs import PARTITION_NAME
from pipeline.store.artefact import (
    artefact_folder,
    is_committed,
    publish,
    read_tensors,
    write_tensors,
)
from pipeline.store.files import sha256_json
from pipeline.store.manifest import SCHEMA_VERSION, read_manifest
from pipeline.superfeatures.partition import Partition

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pipeline.superfeatures.dependency import DependencySum
    from pipeline.superfeatures.grouping import Grouping

_REPAIR = "delete its folder and make the partition again"


@dataclass(frozen=True, kw_only=True)
class PartitionManifest:
    """<store>/artefacts/partition-<fp8>/manifest.json."""

    fingerprint: str
    """Of made_from and options."""
    made_from: dict[str, Any]
    """The network, the records and the probes, as whoever asked for the partition names them."""
    options: dict[str, Any]
    """Of the measurement and of the grouping."""
    grid: tuple[int, int] | None
    records: int
    split_half: float | None
    """Spearman's correlation of two halves of the records; None where they cannot be compared."""
    seed: int
    neighbours: int
    resolution: float
    communities: int
    modularity: tuple[float, ...]
    null_features: tuple[int, ...]
    dependency_sha256: str
    partition_sha256: str
    files: dict[str, str]
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries whose algorithms decide the groups; outside the fingerprint, for people."""
    kind: str = "partition"
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class SavedPartition:
    """What the folder holds."""

    manifest: PartitionManifest
    partition: Partition
    dependency: Tensor
    """W as measured: f64 [d, d]."""


def fingerprint_partition(made_from: dict[str, Any], options: dict[str, Any]) -> str:
    """Of all that changes the numbers."""
    return sha256_json({"made_from": made_from, "options": options})


def partition_folder(store: Path, made_from: dict[str, Any], options: dict[str, Any]) -> Path:
    """Where the partition lies; it is there where the folder has a manifest."""
    return artefact_folder(store, "partition", fingerprint_partition(made_from, options))


def save_partition(
    store: Path,
    grouping: Grouping,
    measured: DependencySum,
    *,
    made_from: dict[str, Any],
    options: dict[str, Any],
) -> Path:
    """Commit it, the manifest last; its folder. One that is there already stays, since passes name its digest."""
    folder = partition_folder(store, made_from, options)
    if is_committed(folder):
        return folder
    partition, dependency, split_half = grouping.partition, measured.matrix, measured.split_half
    tensors = {"assignments": partition.assignments, "dependency": dependency}
    files = write_tensors(folder, PARTITION_NAME, tensors)
    publish(
        folder,
        PartitionManifest(
            fingerprint=fingerprint_partition(made_from, options),
            made_from=made_from,
            options=options,
            grid=partition.grid,
            records=measured.num_records,
            split_half=None if math.isnan(split_half) else split_half,
            seed=grouping.seed,
            neighbours=grouping.neighbours,
            resolution=grouping.resolution,
            communities=grouping.communities,
            modularity=grouping.modularity,
            null_features=grouping.null_features,
            dependency_sha256=_sha256(dependency),
            partition_sha256=partition.sha256,
            files=files,
            made_with={"networkx": networkx.__version__, "torch": torch.__version__},
        ),
    )
    return folder


def load_partition(folder: Path) -> SavedPartition:
    """The partition and W of a folder, checked byte by byte."""
    manifest = read_manifest(PartitionManifest, folder, "the stage that makes partitions")
    tensors = read_tensors(folder, PARTITION_NAME, manifest.files, _REPAIR)
    return SavedPartition(
        manifest=manifest,
        partition=Partition(assignments=tensors["assignments"], grid=manifest.grid),
        dependency=tensors["dependency"],
    )


def _sha256(matrix: Tensor) -> str:
    """Of its values, row by row."""
    return hashlib.sha256(matrix.to(torch.float64).contiguous().numpy().tobytes()).hexdigest()
