"""Reading of stored views: several views from one decoded image, and one view from each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from permafrost.config.augment import RandomViewsConfig
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store, TeacherPass
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, precompute_config, write_tars
from tests.benchmarks.stand_in import StandInConfig
from tests.benchmarks.steps import VIEWS
from tests.support.verbs import precompute

RECORDS = 4_000
STORED = 4
"""Views stored per record."""
BATCH = 100
"""Views per batch."""
ROUNDS = 9


def replay_figure(folder: Path) -> list[Figure]:
    """Measure the speed per view of an epoch with all stored views of a record in a batch, against one of them."""
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    config = precompute_config(tars, path, teacher=StandInConfig(classes=CLASSES))
    precompute.run(replace(config, views=RandomViewsConfig(count=STORED), augment=VIEWS))
    store = Store(path)
    views = store.open_passes(stored_views=True)
    several, one = (_epoch(store, views, per_step) for per_step in (STORED, 1))
    pairs = [(a / STORED, b) for a, b in in_turn(several, one, ROUNDS)]
    per_view = {"unit": "us/view", "scale": 1e6 / RECORDS}
    return [figure("replay_4_views_vs_1", pairs, faster=True, aim=">= 1.0", **per_view)]


def _epoch(store: Store, passes: Sequence[TeacherPass], per_step: int) -> Callable[[], None]:
    """Return a function that reads each record once, with `per_step` of its views."""
    rows = rows_of_split(store.index, "train")
    dataset = StoreDataset(store, rows, passes, keep_bytes=0)  # decode in every epoch
    stream = TrainLoader(dataset, None, batch_size=BATCH, seed=0, views_per_step=per_step)
    epochs = count()

    def read() -> None:
        counted = 0
        for batch in stream.epoch(next(epochs)):
            counted += len(batch.inputs)
            assert len(batch.inputs) == len(batch.targets[0].logits) == BATCH
        assert counted == RECORDS * per_step

    return read
