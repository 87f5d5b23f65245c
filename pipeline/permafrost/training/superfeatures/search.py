"""Search for the superfeatures of a black box: measure, group and save dependencies of features (KED, Algorithm 1).

Shape letters: d features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.models import AdditiveModelConfig, ModelConfig
from permafrost.config.teaching import KEDTeachingConfig
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.core.files import RootedPath
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import evaluation_view, view_images
from permafrost.loading.selection import balanced_order
from permafrost.loading.transfer import iter_on_device
from permafrost.models.classifier import Classifier
from permafrost.models.fingerprint import describe_teacher
from permafrost.models.providers import build_model, freeze, teacher_input_size
from permafrost.store.artifacts import Artifact
from permafrost.store.reader import Store
from permafrost.training.superfeatures.artifact import partition_artifact, save_partition
from permafrost.training.superfeatures.dependency import DependencySums, measure_dependency
from permafrost.training.superfeatures.grouping import count_dependent, group_features
from permafrost.training.superfeatures.probes import (
    Probes,
    feature_scales,
    pixel_probes,
    table_probes,
)

logger = logging.getLogger("permafrost.superfeatures")

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
        return partition_artifact(self.store.folder, self._made_from, self._options())

    @cached_property
    def _made_from(self) -> dict[str, Any]:
        """Description of the inputs. Its computation reads the whole file of weights for the digest."""
        return {
            "store": self.store.manifest.fingerprint,
            "split": self.teaching.split,
            "black_box": describe_teacher(
                self.black_box, len(self.store.manifest.classes), section="black_box"
            ),
            "frame": self.teacher.frame,
            "input_size": list(self._probed_size()),
        }

    def _options(self) -> dict[str, Any]:
        teaching = asdict(self.teaching)
        return {
            **{name: teaching[name] for name in _MEASURED_BY},
            "superfeatures": self.teacher.superfeatures,
            "levels": self._levels(),
            "grid": list(self.teacher.grid) if self.teacher.columns is None else None,
        }

    def _levels(self) -> int:
        return max(self.teacher.superfeatures, self.teaching.levels)

    def _probed_size(self) -> tuple[int, int]:
        side = teacher_input_size(self.black_box)
        return self.input_size if side is None else (side, side)

    def _measure(self, distributed: DistributedContext, device: torch.device) -> DependencySums:
        model = freeze(build_model(self.black_box, len(self.store.manifest.classes))).to(device)
        order = balanced_order(self.store.index, self.teaching.split, self.teaching.grouping_seed)
        size = self._probed_size()
        first = order[: self.teaching.records]
        columns = self.teacher.columns
        probes = table_probes(columns) if columns else pixel_probes(size, self.teacher.grid)
        probes = probes.scale_amplitudes(
            feature_scales((inputs for _, inputs in self._inputs(first, device)), probes)
        )
        total, start, stop = DependencySums.empty(probes.num_features), 0, len(first)
        while True:
            mine = order[start:stop][distributed.rank :: distributed.world_size]
            part = self._measure_rows(model, mine, probes, device)
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

    def _measure_rows(
        self,
        model: Classifier,
        rows: NDArray[np.int64],
        probes: Probes,
        device: torch.device,
    ) -> DependencySums:
        teaching = self.teaching
        return measure_dependency(
            lambda inputs: model(inputs).logits,
            self._inputs(rows, device),
            probes,
            seed=teaching.grouping_seed,
            derivative=teaching.derivative,
            step=teaching.step,
            draws=teaching.draws,
            centered=not self.store.manifest.multi_label,
            modules=model,
        )

    def _inputs(
        self, rows: NDArray[np.int64], device: torch.device
    ) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Iterate over keys and inputs of the black box (images or rows of a table)."""
        size = self._probed_size()
        if len(rows) == 0:
            return
        dataset = StoreDataset(self.store, rows, decode_threads=self.decode_threads)
        for _, batch in iter_on_device(iter_batches(dataset, _BATCH_SIZE), device):
            seen = evaluation_view(batch, self.teacher.frame, size)
            yield batch.keys, view_images(seen, size)

    def _correlation(self) -> Tensor:
        """Correlation of a table's columns over the first records: f64 [d, d]."""
        order = balanced_order(self.store.index, self.teaching.split, self.teaching.grouping_seed)
        rows = [v for _, v in self._inputs(order[: self.teaching.records], torch.device("cpu"))]
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
            levels=max(teacher.superfeatures, min(self._levels(), dependent)),
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
