"""Which rows of a store a run reads. Selection is not data: the store always holds the whole set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config.store import SubsetOptions
from pipeline.core.errors import ConfigError
from pipeline.core.records import NO_LABEL
from pipeline.core.seeds import derive_seed
from pipeline.store.index import has_many_labels

HOLDOUT = "holdout"
"""The name by which an evaluation asks for what subset.holdout kept out of training."""


def rows_of_split(index: pa.Table, split: str) -> NDArray[np.int64]:
    """Rows of the index that belong to `split`, in the index's order."""
    splits = np.asarray(index["split"].to_pylist())
    rows = np.flatnonzero(splits == split)
    if len(rows) == 0:
        known = ", ".join(sorted(set(splits.tolist())))
        raise ConfigError(f"the store has no split {split!r}; it has: {known}")
    return rows


def select_training_rows(index: pa.Table, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Rows that `subset` chooses from a split, in the index's order.

    Each class is permuted by (subset.seed, class); the first `holdout` are kept out, the next `shots`
    taken. So more shots contain fewer, and the choice depends neither on `seed` nor on the method.
    A record with many labels is a record of each of its classes: kept out for one of them it is kept out for
    all, and a class has more than its shots where those of another have it too.
    """
    if subset.shots is None and subset.holdout == 0:
        return rows_of_split(index, split)
    classes = list(_permuted_classes(index, split, subset))
    kept_out = np.zeros(index.num_rows, bool)
    for _, members in classes:
        kept_out[members[: subset.holdout]] = True
    chosen = []
    for label, members in classes:
        remaining = members[~kept_out[members]]
        if subset.shots is not None and len(remaining) < subset.shots:
            raise ConfigError(
                f"subset.shots={subset.shots}, but class {label} of split {split!r} has "
                f"{len(remaining)} records after the holdout"
            )
        chosen.append(remaining[: subset.shots])
    return np.unique(np.concatenate(chosen))


def balanced_order(index: pa.Table, split: str, seed: int) -> NDArray[np.int64]:
    """All rows of a split in an order of which any beginning has nearly as many records of each class.

    It depends on the keys and the seed alone. Records without a label, or with many, count as one class.
    """
    rows = rows_of_split(index, split)
    labels = index["label"].to_numpy()[rows]
    keys = np.asarray(index["key"].to_pylist())[rows]
    turns = np.empty(len(rows), np.int64)
    for label in map(int, np.unique(labels)):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(keys[members])]
        random = np.random.default_rng(derive_seed(seed, "balanced order", label))
        turns[random.permutation(members)] = np.arange(len(members))
    return rows[np.lexsort((labels, turns))]


def select_holdout_rows(index: pa.Table, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Rows of a split that `select_training_rows` keeps out, whatever the shots, in the index's order."""
    if subset.holdout == 0:
        raise ConfigError("subset.holdout=0 keeps no records out; set it to a number of each class")
    chosen = [members[: subset.holdout] for _, members in _permuted_classes(index, split, subset)]
    return np.unique(np.concatenate(chosen))


def _permuted_classes(
    index: pa.Table, split: str, subset: SubsetOptions
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each class of a split with its rows, permuted by (subset.seed, class)."""
    rows = rows_of_split(index, split)
    labels, owners = _labels_of(index, rows)
    if len(np.unique(owners)) < len(rows):
        raise ConfigError(
            f"subset.shots and subset.holdout need labels, split {split!r} has records without"
        )
    keys = np.asarray(index["key"].to_pylist())[rows]
    for label in map(int, np.unique(labels)):
        members = np.unique(owners[labels == label])
        members = members[np.argsort(keys[members])]
        if len(members) < subset.holdout:
            raise ConfigError(
                f"subset.holdout={subset.holdout}, but class {label} of split {split!r} has "
                f"{len(members)} records"
            )
        seed = derive_seed(subset.seed, "subset", label)
        yield label, rows[np.random.default_rng(seed).permutation(members)]


def _labels_of(
    index: pa.Table, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every known label of these rows, and the position among them of the row that has it."""
    if has_many_labels(index):
        lists = index["labels"].take(rows).to_pylist()
        owners = np.repeat(np.arange(len(lists)), [len(labels) for labels in lists])
        return np.array([label for labels in lists for label in labels], np.int64), owners
    labels = index["label"].to_numpy()[rows]
    known = np.flatnonzero(labels != NO_LABEL)
    return labels[known], known
