"""Pack inputs into a store, and store the logits and explanations of a frozen teacher once.

    python -m stages.precompute experiment=demo teacher=none      (packs only)
    python -m stages.precompute experiment=demo
    python -m stages.precompute store.path=stores/demo teacher=cifar teacher.name=resnet20 \\
        teacher.weights=runs/my-teacher/teach/model.safetensors executor=serial

Reads   the data and the teacher's weights
Writes  <store.path>: image shards, index, manifest; teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import main
from pipeline.cluster.executors import build_executor
from pipeline.config.models import NoModelConfig
from pipeline.models.resolve import resolve_precompute
from pipeline.sources.build import build_source, plan_source
from pipeline.store.lock import lock_folder
from pipeline.store.pack import pack
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config.verbs import PrecomputeConfig


@dataclass(frozen=True, kw_only=True)
class PrecomputeResult:
    """Amount of work of this call, zero if nothing was missing."""

    packed_records: int
    teacher_records: int
    """Number of forward passes, where a record counts once for each of its views."""


def run(config: PrecomputeConfig) -> PrecomputeResult:
    """Pack missing shards, run the teacher on missing shards, and publish."""
    path = Path(config.store.path).absolute()
    with lock_folder(path):
        map_shards = build_executor(config.executor, config.cluster)
        source = build_source(config.data)
        records = source.records()
        plans = plan_source(source, records, config.store)
        packed = pack(config, path, source, records, plans, map_shards)
        if isinstance(config.teacher, NoModelConfig):
            return PrecomputeResult(packed_records=packed, teacher_records=0)
        from pipeline.annotation.teacher_pass import annotate_passes  # imports torch

        store = Store(path)
        annotated = annotate_passes(resolve_precompute(config, store), store, map_shards)
    return PrecomputeResult(packed_records=packed, teacher_records=annotated)


if __name__ == "__main__":
    main("precompute", run, __doc__)
