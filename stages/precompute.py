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
from pipeline.config import FileDataConfig, NoModelConfig, PrecomputeConfig, require
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
from pipeline.sources import build_source, plan_source
from pipeline.sources.keys import escape_key
from pipeline.store.columns import BACKENDS
from pipeline.store.files import remove_partial_files
from pipeline.store.lock import lock_folder
from pipeline.store.manifest import DatasetIdentity
from pipeline.store.packing import Packing
from pipeline.store.publish import (
    DEFAULT_FRAME_SIZE,
    missing_image_shards,
    missing_pass_shards,
    needs_publishing,
    publish_pass,
    publish_store,
    published_store,
)
from pipeline.store.reader import TEACHERS_FOLDER, Store
from pipeline.tables import fit_precompute

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pipeline.cluster import MapShards
    from pipeline.config import ModelConfig
    from pipeline.sources import Source
    from pipeline.stored_views import StoredViews
    from pipeline.superfeatures.partition import Partition

logger = logging.getLogger("permafrost.precompute")


@dataclass(frozen=True, kw_only=True)
class PrecomputeResult:
    """How much was done; zeros where everything was there already."""

    packed_records: int
    teacher_records: int
    """Forward passes: a record counts once for each of its views."""


def run(config: PrecomputeConfig) -> PrecomputeResult:
    """Pack what is missing, ask the teacher what is missing, publish."""
    path = Path(config.store.path).absolute()
    with lock_folder(path):
        map_shards = build_executor(config.executor, config.cluster)
        packed = _pack(config, path, map_shards)
        if isinstance(config.teacher, NoModelConfig):
            return PrecomputeResult(packed_records=packed, teacher_records=0)
        config = fit_precompute(config, Store(path))
        assert not isinstance(config.teacher, NoModelConfig)
        annotated = _annotate(config, path, config.teacher, map_shards)
        if config.views.kind != "canonical":
            annotated += _annotate(
                config, path, config.teacher, map_shards, _stored_views(config, path)
            )
    return PrecomputeResult(packed_records=packed, teacher_records=annotated)


def _pack(config: PrecomputeConfig, path: Path, map_shards: MapShards) -> int:
    source = build_source(config.data)
    records = source.records()
    plans = plan_source(source, records, config.store)
    packing = _packing(config, source)
    dataset = DatasetIdentity(
        name=source.name, fingerprint=fingerprint_dataset(config.data, source.revision, records)
    )
    size = config.store.image_size
    missing = missing_image_shards(path, plans, dataset, packing, source.classes, size)
    if not missing and not needs_publishing(path):
        return 0
    remove_partial_files(path)
    published = published_store(path)
    task = PackShard(
        store=path,
        source=source,
        packing=packing,
        dataset_fingerprint=dataset.fingerprint,
        published={} if published is None else {s.name: s.sha256 for s in published.shards},
    )
    packed, _ = _run_shards("pack", map_shards, task, missing)
    in_place = any(plan.reference for plan in plans)
    manifest = publish_store(
        path,
        plans,
        dataset,
        classes=source.classes,
        packing=packing,
        image_size=size,
        shard_size=max(len(plan.records) for plan in plans)
        if in_place
        else config.store.shard_size,
        max_skipped=config.data.max_skipped if isinstance(config.data, FileDataConfig) else 0,
    )
    for entry in manifest.skipped:
        logger.warning("skipped %s", entry["reason"])
    return packed


def _packing(config: PrecomputeConfig, source: Source) -> Packing:
    """A re-encoded frame's size must be known before the images are; an original's is known after."""
    on_error = config.data.on_error if isinstance(config.data, FileDataConfig) else "stop"
    side = config.store.image_size
    if source.columns is not None:
        require(
            side is None and config.store.format == "original",
            f"store.image_size={side} and store.format={config.store.format} are of images, and "
            f"data={config.data.kind} has rows of a table: leave them null and original",
        )
        return Packing(columns=source.columns, on_error=on_error)
    size = source.frame_size if side is None else (side, side)
    return Packing(
        form=config.store.format,
        size=None if config.store.format == "original" else size or DEFAULT_FRAME_SIZE,
        on_error=on_error,
    )


def _stored_views(config: PrecomputeConfig, path: Path) -> StoredViews:
    from pipeline.stored_views import plan_stored_views

    return plan_stored_views(Store(path), config.views, config.augment, config.split, config.subset)


def _annotate(
    config: PrecomputeConfig,
    path: Path,
    teacher: ModelConfig,
    map_shards: MapShards,
    views: StoredViews | None = None,
) -> int:
    """Ask the teacher what is missing of one pass: canonical, or of stored views; forward passes made."""
    from pipeline.explainers.classes import fit_explainer

    store = Store(path)
    num_classes = len(store.manifest.classes)
    explainer = fit_explainer(config.explainer, store, teacher.classes or num_classes)
    description = describe_pass(
        store.manifest,
        describe_teacher(teacher, num_classes, config.annotate.precision),
        explainer,
        config.annotate,
        config.store.backend,
        views,
        _teacher_partition(config, teacher, num_classes),
    )
    fingerprint = fingerprint_pass(description)
    name = escape_key(teacher.name)
    folder = path / TEACHERS_FOLDER / f"{name}-{fingerprint[:SHORT]}"
    shards = [shard for shard in store.manifest.shards if views is None or shard.name in views.rows]
    missing = missing_pass_shards(folder, shards)
    if not missing and not needs_publishing(folder):
        logger.info("%s is complete", folder)
        return 0

    import torch

    from pipeline.annotate import TeacherAnnotator

    specs = TeacherAnnotator(teacher, num_classes, explainer, config.annotate, store.size).fields(
        stored_views=views is not None
    )
    remove_partial_files(folder)
    most = store.manifest.shard_size if views is None else max(map(len, views.rows.values()))
    count = 1 if views is None else views.count
    columns = BACKENDS[config.store.backend](folder, specs, len(shards), most, count)
    shared_files = columns.create()
    task = AnnotateShard(
        path,
        folder,
        columns,
        fingerprint,
        teacher,
        num_classes,
        explainer,
        config.annotate,
        config.cluster.threads_per_actor,
        config.cluster.decode_threads,
        views,
    )
    annotated, seconds = _run_shards("teacher", map_shards, task, missing)
    save_cost(RUNS / config.run / "precompute", seconds, annotated)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    publish_pass(folder, shards, description, fingerprint, specs, shared_files, device)
    return annotated * count


def _teacher_partition(
    config: PrecomputeConfig, teacher: ModelConfig, num_classes: int
) -> Partition | None:
    """Of the teacher's superfeatures, where they are stored; ConfigError where it has none."""
    if "ked_z" not in config.annotate.payloads:
        return None
    from pipeline.models import build_model
    from pipeline.models.additive import network_partition

    return network_partition(build_model(teacher, num_classes))


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
