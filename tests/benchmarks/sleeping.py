"""A pass whose teacher sleeps as long as an H100 computes and holds no lock of Python: what a GPU would be kept busy.

Its outputs return what the device would have encoded. So what remains on the host is what a pass on a GPU has there:
reading and decoding, collecting a shard's values, and writing them. The bound is the longest of the three if they were
perfectly overlapped, and each is measured in the same pass.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from permafrost.annotation import annotator, shard_tasks, teacher_pass
from permafrost.annotation.outputs import BatchInfo, EncodedFields
from permafrost.config.cluster import LocalClusterConfig
from permafrost.core.records import FieldSpec
from permafrost.models.classifier import NO_INTERMEDIATES, Classifier, ModelOutput
from permafrost.store.record_form import ImageForm
from tests.benchmarks.figures import Figure, figure
from tests.benchmarks.inputs import CLASSES, pack, precompute_config, write_tars
from tests.benchmarks.stand_in import StandInConfig
from tests.support.verbs import precompute

BATCH = 64
ROUNDS = 5
THREADS = 1
"""Decoding threads, as the other core of two is taken by something else."""


def _logits() -> dict[str, Tensor]:
    return {"logits": torch.randn(BATCH, CLASSES).half()}


def _maps(channels: int, side: int) -> dict[str, Tensor]:
    return {
        **_logits(),
        "map": torch.randn(BATCH, 1, channels, side, side).half(),
        "map_scale": torch.rand(BATCH, 1),
        "target_class": torch.zeros(BATCH, 1, dtype=torch.int32),
    }


def _features() -> dict[str, Tensor]:
    return {
        **_logits(),
        "features_4": torch.randint(-127, 128, (BATCH, 2048, 7, 7), dtype=torch.int8),
        "features_4_scale": torch.rand(BATCH, 2048),
        "features_pooled": torch.randn(BATCH, 2048).half(),
    }


OUTPUTS: dict[str, tuple[Callable[[], dict[str, Tensor]], int, int, int]] = {
    "logits": (_logits, 4500, 8192, 1024),
    "gradcam": (lambda: _maps(1, 7), 4000, 8192, 1024),
    "features": (_features, 3000, 8192, 256),
    "bcos": (lambda: _maps(6, 224), 800, 4096, 256),
}
"""Fields of a batch as they are stored, records per second of an H100 (ViT-B, ResNet-50 with GradCAM and with mirrored
features, B-cos ResNet-50, all in bfloat16 or, for B-cos, float32; from published tables), records, records of a shard.

A pass computes its first shard before it writes anything, and writes its last one after all others are computed. So one
of large fields needs many shards here, as a set of real size has.
"""


def sleeping_names() -> tuple[str, ...]:
    """Return the names of the figures."""
    return tuple(f"pass_sleeping_{name}" for name in OUTPUTS)


def sleeping_figures(folder: Path) -> list[Figure]:
    """Measure passes against the longest of computing, decoding and writing."""
    figures = []
    for name, (fields, rate, records, per_shard) in OUTPUTS.items():
        tars = write_tars(folder / f"tars-{name}", records, 224, distinct=64, per_tar=per_shard)
        store = folder / name
        pack(tars, store)
        outputs = ("logits", "maps") if "map" in fields() else ("logits",)
        teacher = StandInConfig(classes=CLASSES)
        options = precompute_config(tars, store, teacher=teacher, outputs=outputs)
        config = replace(options, cluster=LocalClusterConfig(decode_threads=THREADS))
        pairs = []
        for _ in range(ROUNDS):
            shutil.rmtree(store / "teachers", ignore_errors=True)
            with _sleeping_teacher(fields(), rate) as spent:
                precompute.run(config)
            longest = max(spent["compute"], spent["decode"] / THREADS, spent["write"])
            pairs.append((spent["wall"], longest))
        figures.append(
            figure(
                f"pass_sleeping_{name}",
                pairs,
                faster=True,
                unit="ms/record",
                scale=1e3 / records,
                aim=">= 0.95",
            )
        )
        shutil.rmtree(store)
    return figures


class _CannedOutput:
    """Kind of output that returns the same fields for each batch."""

    intermediates: ClassVar = NO_INTERMEDIATES

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self.canned = fields

    def fields(self, model: Classifier, output: ModelOutput) -> list[FieldSpec]:
        return [
            FieldSpec(
                name=name,
                shape=tuple(values.shape[1:]),
                dtype=str(values.dtype).removeprefix("torch."),
                axes=tuple(f"axis{number}" for number in range(values.dim() - 1)),
            )
            for name, values in self.canned.items()
        ]

    def encode(self, model: Classifier, output: ModelOutput, records: BatchInfo) -> EncodedFields:
        count = len(records.keys)
        return EncodedFields({name: values[:count] for name, values in self.canned.items()}, {})


@contextmanager
def _sleeping_teacher(fields: dict[str, Tensor], rate: int) -> Iterator[dict[str, float]]:
    """Have teachers sleep in the block, and provide the seconds of each part."""
    spent = {"compute": 0.0, "decode": 0.0, "write": 0.0, "wall": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*words, **options)
            finally:
                spent[part] += time.perf_counter() - started

        return run

    def sleep(self: Any, inputs: Tensor, outputs: Any) -> ModelOutput:
        time.sleep(len(inputs) / rate)
        return ModelOutput(torch.zeros(len(inputs), CLASSES), torch.zeros(len(inputs), 4, 2, 2))

    teacher, task = annotator.TeacherAnnotator, shard_tasks
    changes: list[tuple[Any, str, Any]] = [
        (teacher, "_forward", timed("compute", sleep)),
        (teacher, "inputs_of", lambda self, batch, margin: batch.frames),
        (annotator, "build_outputs", lambda config, explainer: [_CannedOutput(fields)]),
        (annotator, "_finite_records", lambda values: {}),  # the device's work, too
        (task, "write_pass_shard", timed("write", task.write_pass_shard)),
        (ImageForm, "decode", timed("decode", ImageForm.decode)),
        (teacher_pass, "run_shards", timed("wall", teacher_pass.run_shards)),
        (teacher_pass, "check_teacher", lambda *words, **options: None),
    ]
    with ExitStack() as stack:
        for owner, name, change in changes:
            stack.enter_context(patch.object(owner, name, change))
        yield spent
