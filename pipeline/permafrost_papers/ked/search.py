"""Search for the superfeatures of a black box (KED, Algorithm 1), and the artifact of the store that has its result.

Dependencies of features are measured (dependency.py) and grouped (grouping.py).

Shape letters: d features, M superfeatures.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.builder import to_plain_dict
from permafrost.config.models import ModelConfig, NoModelConfig, usual_picture
from permafrost.config.teaching import TeachConfig
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.core.json_entries import from_dict
from permafrost.core.progress import progress
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.decode_threads import decode_threads_of
from permafrost.loading.geometry import view_images
from permafrost.loading.transfer import iter_on_device
from permafrost.models.compute import (
    deterministic_algorithms,
    device_name,
    resolve_device,
    torch_threads,
)
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.artifacts import Artifact, load_artifact
from permafrost.store.reader import Store
from permafrost_papers.ked.curvature import feature_scales, pixel_probes, table_probes
from permafrost_papers.ked.dependency import (
    DependencySums,
    inputs_of_a_record,
    measure_dependency,
)
from permafrost_papers.ked.grouping import Grouping, GroupingFacts, count_dependent, group_features
from permafrost_papers.ked.options import PARTITION_NAME, AdditiveModelConfig, KEDTeachingConfig
from permafrost_papers.ked.partition import Partition
from permafrost_papers.probe_set import balanced_order

logger = logging.getLogger("permafrost.superfeatures")

_MADE_BY = "permafrost teach with teaching=ked"


@dataclass(frozen=True, kw_only=True)
class PartitionFacts(GroupingFacts):
    """Description of the artifact."""

    grid: tuple[int, int] | None
    records: int
    split_half: float | None
    """Spearman correlation of two halves of the records, None if they cannot be compared."""
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

    Args:
        store: Folder of the store.
        made_from: Descriptions of the network, the records and the probes.
        options: Options of the measurement and of the grouping.
    """
    return Artifact(store, "partition", {**made_from, "options": options}, _MADE_BY)


def save_partition(artifact: Artifact, grouping: Grouping, measured: DependencySums) -> None:
    """Write the result. An existing artifact is kept, because passes refer to its digest."""
    partition, split_half = grouping.partition, measured.split_half
    values = measured.matrix.to(torch.float64).contiguous().numpy()
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
        dependency_sha256=hashlib.sha256(values.tobytes()).hexdigest(),
        partition_sha256=partition.sha256,
        made_with={"networkx": networkx.__version__, "torch": torch.__version__},
    )
    tensors = {"assignments": partition.assignments, "dependency": measured.matrix}
    artifact.save(tensors, to_plain_dict(facts), wait=True)


def load_partition(folder: RootedPath) -> SavedPartition:
    """Load the partition and W from an artifact's folder, with a check of every byte.

    Raises:
        ManifestError: If a file is damaged or missing.
    """
    manifest, tensors = load_artifact(folder, _MADE_BY)
    facts = from_dict(PartitionFacts, manifest.description)
    return SavedPartition(
        made_from=manifest.made_from,
        facts=facts,
        partition=Partition(assignments=tensors["assignments"], grid=facts.grid),
        dependency=tensors["dependency"],
    )


_BATCH_SIZE = 64
"""Number of records read together. Each is measured separately."""
_MEASURED_BY = (
    "records",
    "max_records",
    "derivative",
    "step",
    "draws",
    "neighbors",
    "resolution",
    "grouping_seed",
)
"""Options of teaching=ked that determine a partition."""


@dataclass(frozen=True, kw_only=True)
class PartitionSearch:
    """Inputs that determine a partition of image blocks or table columns, and the artifact that stores it."""

    store: Store
    black_box: ModelConfig
    teacher: AdditiveModelConfig
    """Teacher whose features are grouped: the blocks of the image in its `grid` (in trunk mode those that its cells
    cover), or the columns of a table."""
    teaching: KEDTeachingConfig
    input_size: tuple[int, int]
    """(height, width) of the teacher's view."""
    device: str = "cpu"
    """Name of the hardware that measures. The kernels of another one round in another way, which groups may show."""
    decode_threads: int = 1
    """Threads that decode a batch, in each rank."""

    @property
    def folder(self) -> RootedPath:
        """Folder <store>/artifacts/partition-<fp8>."""
        return self._artifact.folder

    def run(self, distributed: DistributedContext, device: torch.device) -> RootedPath:
        """Measure dependencies with the records divided over ranks, save the partition, and return its folder.

        An existing partition is kept. The number of ranks and the batches change at most the last bits of the sum,
        which the grouping rounds away.

        Raises:
            ConfigError: If fewer features depend on others than superfeatures are asked for.
        """
        exists = torch.tensor(float(self._artifact.exists))
        if not distributed.sum(exists):
            measured = self._measure(distributed, device)
            if distributed.is_first:
                self._group(measured)
            distributed.sum(exists)  # barrier: the other ranks wait for the first
        return self.folder

    @cached_property
    def _artifact(self) -> Artifact:
        black_box = Network(self.black_box, self.store.manifest.classes, "black_box")
        made_from = {
            "store": self.store.manifest.fingerprint,
            "split": self.teaching.split,
            "black_box": black_box.describe(),  # reads the whole file of weights for the digest
            "frame": self.teacher.frame,
            "input_size": list(self._probed_size()),
        }
        return partition_artifact(self.store.folder, made_from, self._options())

    def _options(self) -> dict[str, Any]:
        return {
            **{name: getattr(self.teaching, name) for name in _MEASURED_BY},
            "superfeatures": self.teacher.superfeatures,
            "levels": max(self.teacher.superfeatures, self.teaching.levels),
            "grid": list(self.teacher.grid) if self.teacher.columns is None else None,
            **({} if self.device == "cpu" else {"device": self.device}),
        }

    def _probed_size(self) -> tuple[int, int]:
        side = Network(self.black_box, self.store.manifest.classes).input_size
        return self.input_size if side is None else (side, side)

    def _measure(self, distributed: DistributedContext, device: torch.device) -> DependencySums:
        model = freeze(build_model(self.black_box, self.store.manifest.classes)).to(device)
        order = balanced_order(self.store.index, self.teaching.split, self.teaching.grouping_seed)
        first = order[: self.teaching.records]
        columns, grid = self.teacher.columns, self.teacher.grid
        probes = table_probes(columns) if columns else pixel_probes(self._probed_size(), grid)
        probes = probes.scale_amplitudes(
            feature_scales((inputs for _, inputs in self._inputs(first, device)), probes)
        )
        logger.info(
            "searching superfeatures: %s inputs of the black box for each of %s records, more if halves of them differ",
            f"{inputs_of_a_record(self.teaching.derivative, probes.num_features, self.teaching.draws):,}",
            f"{len(first):,}",
        )
        total, start, stop = DependencySums.empty(probes.num_features), 0, len(first)
        while True:
            mine = order[start:stop][distributed.rank :: distributed.world_size]
            with (
                progress("superfeatures", total=len(mine), unit="record")
                if distributed.is_first
                else nullcontext()
            ):
                part = measure_dependency(
                    lambda inputs: model(inputs).logits,
                    self._inputs(mine, device),
                    probes,
                    seed=self.teaching.grouping_seed,
                    derivative=self.teaching.derivative,
                    step=self.teaching.step,
                    draws=self.teaching.draws,
                    centered=not self.store.manifest.multi_label,
                    modules=model,
                )
            total = total + DependencySums(
                squares=distributed.sum(part.squares), records=distributed.sum(part.records)
            )
            logger.info(
                "dependency of %d features in %d records, rank correlation of two halves %.3f",
                probes.num_features,
                total.num_records,
                total.split_half,
            )
            limit = min(2 * stop, self.teaching.max_records, len(order))
            if limit <= stop or not total.needs_more_records:
                break
            start, stop = stop, limit
        if total.needs_more_records:
            logger.warning(
                "the rank correlation of dependencies between two halves of %d records is only %.3f, so the groups may "
                "differ with other records; raise teaching.max_records or teaching.draws",
                total.num_records,
                total.split_half,
            )
        return total

    def _inputs(
        self, rows: NDArray[np.int64], device: torch.device
    ) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Iterate over keys and inputs of the black box (images or rows of a table)."""
        size = self._probed_size()
        if len(rows) == 0:
            return
        dataset = StoreDataset(self.store, rows, decode_threads=self.decode_threads)
        dataset = dataset.in_picture(usual_picture(size, self.store.size).on(self.teacher.frame))
        yield from (
            (batch.keys, view_images(batch, size))
            for batch in iter_on_device(iter_batches(dataset, _BATCH_SIZE), device)
        )

    def _correlation(self) -> Tensor:
        """Correlation of a table's columns over the first records: f64 [d, d]."""
        order = balanced_order(self.store.index, self.teaching.split, self.teaching.grouping_seed)
        rows = [
            inputs
            for _, inputs in self._inputs(order[: self.teaching.records], torch.device("cpu"))
        ]
        return torch.corrcoef(torch.cat(rows).double().T)

    def _group(self, measured: DependencySums) -> None:
        teaching, teacher = self.teaching, self.teacher
        dependent = count_dependent(measured.matrix)
        require(
            teacher.superfeatures <= dependent or dependent == 0,
            f"teacher.superfeatures={teacher.superfeatures}, but only {dependent} of {teacher.features} features "
            "depend on others in the black box's logits; lower it, or (for images) set a finer teacher.grid",
        )
        grouping = group_features(
            measured.matrix,
            teacher.superfeatures,
            levels=max(teacher.superfeatures, min(teaching.levels, dependent)),
            seed=teaching.grouping_seed,
            grid=teacher.grid if teacher.columns is None else None,
            correlation=self._correlation() if teacher.columns else None,
            neighbors=teaching.neighbors,
            resolution=teaching.resolution,
        )
        save_partition(self._artifact, grouping, measured)
        logger.info(
            "%d communities, modularity %.3f with %d superfeatures, %d features without dependencies: %s",
            grouping.communities,
            grouping.modularity[teacher.superfeatures - 1],
            teacher.superfeatures,
            len(grouping.null_features),
            self.folder,
        )


def search_superfeatures(
    config: TeachConfig, folder: Path, distributed: DistributedContext
) -> None:
    """Find the superfeatures of teaching=ked, and write their partition into the folder of the run.

    Args:
        config: Options of `teach`.
        folder: Folder of the run.
        distributed: Ranks that share the measurement.

    Raises:
        ConfigError: If fewer features depend on others than superfeatures are asked for.
    """
    teaching, teacher, black_box = config.teaching, config.teacher, config.black_box
    assert isinstance(teaching, KEDTeachingConfig)
    assert isinstance(teacher, AdditiveModelConfig)
    assert not isinstance(black_box, NoModelConfig)
    trainer = teaching.trainer
    store = Store(config.store.folder)
    size = teaching.augment.size
    device = distributed.device or resolve_device("trainer.device", trainer.device)
    search = PartitionSearch(
        store=store,
        black_box=black_box,
        teacher=teacher,
        teaching=teaching,
        input_size=store.size if size is None else (size, size),
        device=device_name(device),
        decode_threads=decode_threads_of(trainer, distributed),
    )
    threads = torch_threads(trainer.num_threads or torch.get_num_threads())
    with threads, deterministic_algorithms(device, enabled=trainer.deterministic):
        result = search.run(distributed, device) / PARTITION_NAME
    if distributed.is_first:
        load_partition(result.parent)  # checks its bytes
        file_at(folder / PARTITION_NAME).write(file_at(result).read())
