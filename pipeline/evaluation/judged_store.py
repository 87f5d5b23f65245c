"""What a finished student is judged on: a store, what its teachers say there, and the records of a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import require
from pipeline.selection import HOLDOUT, rows_of_split, select_holdout_rows
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import EvaluateConfig
    from pipeline.dataset import StoreDataset
    from pipeline.runs import TrainedModel
    from pipeline.store.reader import TeacherPass


def open_judged(config: EvaluateConfig, names: Sequence[str]) -> tuple[Store, list[TeacherPass]]:
    """The store that students are judged on, and what its teachers say there.

    names  of the passes in store.path that the student learned from; for a student of labels the store's
           only pass, if it has just one. In evaluate.store it is the passes of the same teachers.
    """
    taught = Store(Path(config.store.path))
    passes = []
    if names or len(taught.pass_folders()) == 1:
        passes = taught.open_passes(names)
    if config.evaluate.store is None:
        return taught, passes
    require(
        HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} are records of the store that the student learned from, and "
        f"evaluate.store={config.evaluate.store} is another; name a split of that one",
    )
    judged = Store(Path(config.evaluate.store))
    return judged, [judged.canonical_of(teacher) for teacher in passes]


def open_for_student(
    config: EvaluateConfig, trained: TrainedModel
) -> tuple[Store, list[TeacherPass]]:
    """As `open_judged`; passes that nobody named are left out where they know other classes."""
    names = config.store.teacher or trained.teachers
    store, passes = open_judged(config, names)
    if not names:
        passes = [teacher for teacher in passes if teacher.num_classes == trained.num_classes]
    return store, passes


def open_split(
    store: Store, passes: Sequence[TeacherPass], split: str, trained: TrainedModel
) -> StoreDataset:
    """The records of one of evaluate.splits, with their regions."""
    from pipeline.dataset import StoreDataset

    if split == HOLDOUT:
        rows = select_holdout_rows(store.index, trained.split, trained.subset)
    else:
        rows = rows_of_split(store.index, split)
    return StoreDataset(store, rows, passes, with_regions=True, num_classes=trained.num_classes)
