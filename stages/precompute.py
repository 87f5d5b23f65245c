"""Pack inputs into a store and write what a frozen teacher says and where it looks, once.

    python -m stages.precompute experiment=demo teacher=none      (packs only)
    python -m stages.precompute experiment=demo
    python -m stages.precompute store.path=stores/demo teacher=cifar teacher.name=resnet20 \\
        teacher.weights=runs/my-teacher/teach/model.safetensors executor=serial

Reads   the data and the teacher's weights
Writes  <store.path>: image shards, index, manifest; teachers/<name>-<fingerprint>/
Again   the same command finishes what is missing; when nothing is, it computes nothing
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster import build_executor
from pipeline.commandline import main
from pipeline.config import NoModelConfig, PrecomputeConfig
from pipeline.fingerprint import (
    SHORT,
    describe_pass,
    describe_teacher,
    fingerprint_dataset,
    fingerprint_pass,
)
from pipeline.progress import progress
from pipeline.runs import RUNS, save_cost
from pipeline.shard_tasks import AnnotateShard, PackShard
from pipeline.sources import build_source
from pipeline.store.columns import BACKENDS
from pipeline.store.files import remove_partial_files
from pipeline.store.manifest import CanonicalFrame, DatasetIdentity
from pipeline.store.plan import plan_shards
from pipeline.store.publish import (
    missing_image_shards,
    missing_pass_shards,
    publish_pass,
    publish_store,
)
from pipeline.store.reader import TEACHERS_FOLDER, Store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pipeline.cluster import MapShards
    from pipeline.config import ModelConfig

logger = logging.getLogger("permafrost.precompute")


@dataclass(frozen=True, kw_only=True)
class PrecomputeResult:
    """How much was done; zeros where everything was there already."""

    packed_records: int
    teacher_records: int


def run(config: PrecomputeConfig) -> PrecomputeResult:
    """Pack what is missing, ask the teacher what is missing, publish."""
    map_shards = build_executor(config.executor, config.cluster)
    packed = _pack(config, map_shards)
    if isinstance(config.teacher, NoModelConfig):
        return PrecomputeResult(packed_records=packed, teacher_records=0)
    annotated = _annotate(config, config.teacher, map_shards)
    return PrecomputeResult(packed_records=packed, teacher_records=annotated)


def _pack(config: PrecomputeConfig, map_shards: MapShards) -> int:
    path = Path(config.store.path).absolute()
    source = build_source(config.data)
    records = source.records()
    plans = plan_shards(records, config.store.shard_size, config.store.seed)
    dataset = DatasetIdentity(
        name=source.name, fingerprint=fingerprint_dataset(config.data, source.revision, records)
    )
    missing = missing_image_shards(path, plans, dataset)
    if not missing and (path / "manifest.json").exists():
        return 0
    remove_partial_files(path)
    task = PackShard(store=path, source=source, dataset_fingerprint=dataset.fingerprint)
    packed, _ = _run_shards("pack", map_shards, task, missing)
    height, width = source.frame_size
    publish_store(
        path,
        plans,
        dataset,
        classes=source.classes,
        canonical=CanonicalFrame(height=height, width=width),
        shard_size=config.store.shard_size,
    )
    return packed


def _annotate(config: PrecomputeConfig, teacher: ModelConfig, map_shards: MapShards) -> int:
    store = Store(Path(config.store.path).absolute())
    num_classes = len(store.manifest.classes)
    description = describe_pass(
        store.manifest,
        describe_teacher(teacher, num_classes),
        config.explainer,
        config.annotate,
        config.store.backend,
    )
    fingerprint = fingerprint_pass(description)
    folder = store.path / TEACHERS_FOLDER / f"{teacher.name}-{fingerprint[:SHORT]}"
    missing = missing_pass_shards(folder, store.manifest.shards)
    if (folder / "manifest.json").exists():
        logger.info("%s is complete", folder)
        return 0

    import torch

    from pipeline.annotate import TeacherAnnotator

    specs = TeacherAnnotator(teacher, num_classes, config.explainer, config.annotate).fields(
        store.size
    )
    remove_partial_files(folder)
    shards = store.manifest.shards
    columns = BACKENDS[config.store.backend](
        folder, specs, len(shards), store.manifest.shard_size, description["views"]["count"]
    )
    shared_files = columns.create()
    task = AnnotateShard(
        store.path,
        folder,
        columns,
        fingerprint,
        teacher,
        num_classes,
        config.explainer,
        config.annotate,
        config.cluster.threads_per_actor,
    )
    annotated, seconds = _run_shards("teacher", map_shards, task, missing)
    save_cost(RUNS / config.run / "precompute", seconds, annotated)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    publish_pass(folder, shards, description, fingerprint, specs, shared_files, device)
    return annotated


def _run_shards(
    title: str, map_shards: MapShards, task: Any, shards: Sequence[Any]
) -> tuple[int, float]:
    """Records finished, and the seconds that their shards took."""
    records, seconds = 0, 0.0
    with progress(title, total=len(shards), unit="shard") as bar:
        for result in map_shards(task, shards):
            records += result.records
            seconds += result.seconds
            bar.update(1)
    return records, seconds


if __name__ == "__main__":
    main("precompute", run, __doc__)
