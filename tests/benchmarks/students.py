"""Cost of ten students of one teacher: from a store that the teacher fills once, and with the teacher in every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.loading.loader import TrainLoader
from permafrost.models.providers import build_model
from permafrost.store.reader import Store
from tests.benchmarks.figures import Figure, figure, in_rounds
from tests.benchmarks.inputs import CLASSES, pack, write_tars
from tests.benchmarks.precomputing import annotator
from tests.benchmarks.steps import BATCH, SIZE, TEACHER, Steps, build_live_teacher, open_stream

STUDENTS = 10
RECORDS = 20 * BATCH
ROUNDS = 5
NAME = "ten_frozen_vs_ten_live_students"


def students_figure(folder: Path) -> list[Figure]:
    """Measure the pass of a ResNet-56 and an epoch of a ResNet-20 of each kind, reading included.

    The sum of the pass and ten frozen epochs is compared with ten live epochs, which is the least favorable case: the
    pass is paid once however many epochs follow.
    """
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    pack(tars, path)
    teacher = _save_teacher(folder / "teacher.pt")
    annotate = annotator(tars, path, RECORDS, teacher=teacher)
    annotate()
    store = Store(path)
    stored, images = open_stream(store, store.open_passes()), open_stream(store, ())
    times = in_rounds(
        {
            "pass": annotate,
            "frozen": _epoch(stored, Steps(E2KDConfig(lambda_map=5.0), ())),
            "live": _epoch(
                images, Steps(E2KDConfig(lambda_map=5.0), (), build_live_teacher(teacher))
            ),
        },
        ROUNDS,
    )
    pairs = [
        (once + STUDENTS * frozen, STUDENTS * live)
        for once, frozen, live in zip(*times.values(), strict=True)
    ]
    unit = {"unit": "ms/record", "scale": 1e3 / RECORDS}
    return [figure(NAME, pairs, faster=True, aim=">= 1.5", **unit)]


def _save_teacher(path: Path) -> CifarModelConfig:
    """Save the random teacher with statistics of its batch norms.

    Without them, the outputs of 56 layers grow beyond the range of float16.
    """
    model = build_model(TEACHER, CLASSES).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(BATCH, 3, *SIZE, generator=generator))
    torch.save(model.network.state_dict(), path)
    return replace(TEACHER, weights=str(path))


def _epoch(stream: TrainLoader, steps: Steps) -> Callable[[], None]:
    """Return a function that trains a student for one epoch."""

    def train() -> None:
        for batch in stream.epoch(0):
            steps.take(batch)

    return train
