"""Cost of ten students of one teacher: from a store that the teacher fills once, and with the teacher in every step.

The rivals are ten jobs, each with its own live teacher, and a single job in which ten students share each batch, its
views and the outputs of one live teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from permafrost.config.augment import RandomViewsConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import CifarModelConfig
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.subset import rows_of_split
from permafrost.models.providers import build_model
from permafrost.store.reader import Store
from permafrost.training.targets import LiveTeacher
from permafrost_estimate.steps import SharedTargets
from tests.benchmarks.figures import Figure, figure, in_rounds
from tests.benchmarks.inputs import CLASSES, pack, precompute_config, write_tars
from tests.benchmarks.precomputing import annotator
from tests.benchmarks.steps import (
    BATCH,
    SIZE,
    TEACHER,
    VIEWS,
    Steps,
    build_live_teacher,
    open_stream,
)
from tests.support.verbs import precompute

STUDENTS = 10
METHOD = E2KDConfig(lambda_map=5.0)
RECORDS = 20 * BATCH
ROUNDS = 5
EPOCHS = 100
"""Epochs of the students of the last figure."""
NAME = "ten_frozen_vs_ten_live_students"
SHARING = "ten_frozen_vs_ten_sharing_students"
SHARING_LONG = f"{SHARING}_{EPOCHS}_epochs"
REPLAYED = "replayed_vs_live_epoch"
STORED = 16
"""Stored views per record of the replayed student."""


def students_figures(folder: Path) -> list[Figure]:
    """Measure the pass of a ResNet-56 and an epoch of a ResNet-20 of each kind, reading included.

    The sum of the pass and ten frozen epochs is compared with ten live epochs, which is the least favorable case: the
    pass is paid once however many epochs follow. Against students that share a teacher, it is compared after one epoch
    and after EPOCHS. An epoch that replays one of several stored views is compared with a live one, without its pass.
    """
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    pack(tars, path)
    teacher = _save_teacher(folder / "teacher.pt")
    annotate = annotator(tars, path, RECORDS, teacher=teacher)
    annotate()
    store = Store(path)
    stored, images = open_stream(store, store.open_passes()), open_stream(store, ())
    live = build_live_teacher(teacher)
    times = in_rounds(
        {
            "pass": annotate,
            "frozen": _epoch(stored, Steps(METHOD, ())),
            "live": _epoch(images, Steps(METHOD, (), live)),
            "sharing": _shared_epoch(images, live),
            "replayed": _epoch(
                _stream_of_views(tars, folder / "views", teacher), Steps(METHOD, ())
            ),
        },
        ROUNDS,
    )
    rounds = list(zip(*times.values(), strict=True))
    unit = {"unit": "ms/record", "scale": 1e3 / RECORDS}
    pairs = {
        NAME: [(once + STUDENTS * frozen, STUDENTS * alone) for once, frozen, alone, *_ in rounds],
        SHARING: [(once + STUDENTS * frozen, sharing) for once, frozen, _, sharing, _ in rounds],
        SHARING_LONG: [
            (once / EPOCHS + STUDENTS * frozen, sharing) for once, frozen, _, sharing, _ in rounds
        ],
        REPLAYED: [(replayed, alone) for _, _, alone, _, replayed in rounds],
    }
    aims = {NAME: ">= 1.5", SHARING: "", SHARING_LONG: ">= 1.0", REPLAYED: ""}
    return [figure(name, pairs[name], faster=True, aim=aims[name], **unit) for name in pairs]


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


def _stream_of_views(tars: Path, path: Path, teacher: CifarModelConfig) -> TrainLoader:
    """Store views of the records, and open the stream of a training that replays them."""
    config = precompute_config(tars, path, teacher=teacher, outputs=("logits", "maps"))
    precompute.run(replace(config, views=RandomViewsConfig(count=STORED), augment=VIEWS))
    store = Store(path)
    passes = store.open_passes(stored_views=True)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), passes)
    return TrainLoader(dataset, None, batch_size=BATCH, seed=0)


def _epoch(stream: TrainLoader, steps: Steps) -> Callable[[], None]:
    """Return a function that trains a student for one epoch."""

    def train() -> None:
        for batch in stream.epoch(0):
            steps.take(batch)

    return train


def _shared_epoch(stream: TrainLoader, teacher: LiveTeacher) -> Callable[[], None]:
    """Return a function that trains all students in one loop over the batches."""
    shared = SharedTargets(teacher)
    students = [Steps(METHOD, (), shared) for _ in range(STUDENTS)]

    def train() -> None:
        for batch in stream.epoch(0):
            views = replace(batch, rendered=view_images(batch, SIZE))
            for student in students:
                student.take(views)

    return train
