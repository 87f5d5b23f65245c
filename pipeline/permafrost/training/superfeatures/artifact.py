"""The partition found by a search, as an artifact of its store, with W and the facts of the search.

Shape letters: d features, M superfeatures.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor

from permafrost.config.runs import to_plain_dict
from permafrost.core.files import RootedPath
from permafrost.models.additive.partition import Partition
from permafrost.store.artifacts import Artifact, load_artifact
from permafrost.store.entries import from_dict
from permafrost.training.superfeatures.dependency import DependencySums
from permafrost.training.superfeatures.grouping import Grouping

_MADE_BY = "permafrost teach with teaching=ked"


@dataclass(frozen=True, kw_only=True)
class PartitionFacts:
    """Description of the artifact."""

    grid: tuple[int, int] | None
    records: int
    split_half: float | None
    """Spearman correlation of two halves of the records, None if they cannot be compared."""
    seed: int
    neighbors: int
    resolution: float
    communities: int
    modularity: tuple[float, ...]
    null_features: tuple[int, ...]
    dependency_sha256: str
    partition_sha256: str
    made_with: dict[str, str]
    """Versions of the libraries that determine the groups, for information only and not part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class SavedPartition:
    """Content of the artifact's folder."""

    made_from: dict[str, Any]
    facts: PartitionFacts
    partition: Partition
    dependency: Tensor
    """Measured matrix W, f64 [d, d]."""


def partition_artifact(
    store: RootedPath, made_from: dict[str, Any], options: dict[str, Any]
) -> Artifact:
    """Return the artifact of a search.

    made_from  the network, the records and the probes
    options    options of the measurement and of the grouping
    """
    return Artifact(store, "partition", {**made_from, "options": options}, _MADE_BY)


def save_partition(artifact: Artifact, grouping: Grouping, measured: DependencySums) -> None:
    """Write the result. An existing artifact is kept, because passes refer to its digest."""
    partition, split_half = grouping.partition, measured.split_half
    facts = PartitionFacts(
        grid=partition.grid,
        records=measured.num_records,
        split_half=None if math.isnan(split_half) else split_half,
        seed=grouping.seed,
        neighbors=grouping.neighbors,
        resolution=grouping.resolution,
        communities=grouping.communities,
        modularity=grouping.modularity,
        null_features=grouping.null_features,
        dependency_sha256=_sha256(measured.matrix),
        partition_sha256=partition.sha256,
        made_with={"networkx": networkx.__version__, "torch": torch.__version__},
    )
    tensors = {"assignments": partition.assignments, "dependency": measured.matrix}
    artifact.save(tensors, to_plain_dict(facts), wait=True)


def load_partition(folder: RootedPath) -> SavedPartition:
    """Load the partition and W from an artifact's folder, with a check of every byte."""
    manifest, tensors = load_artifact(folder, _MADE_BY)
    facts = from_dict(PartitionFacts, manifest.description)
    return SavedPartition(
        made_from=manifest.made_from,
        facts=facts,
        partition=Partition(assignments=tensors["assignments"], grid=facts.grid),
        dependency=tensors["dependency"],
    )


def _sha256(matrix: Tensor) -> str:
    """SHA-256 of the matrix values, row by row."""
    return hashlib.sha256(matrix.to(torch.float64).contiguous().numpy().tobytes()).hexdigest()
