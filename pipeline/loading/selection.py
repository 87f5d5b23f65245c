"""Selection of the rows of a store that a run reads. The store itself always contains the whole set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config.store import SubsetOptions
from pipeline.core.errors import ConfigError
from pipeline.core.records import NO_LABEL
from pipeline.core.seeds import derive_seed
from pipeline.store.index import has_many_labels

HOLDOUT = "holdout"
"""Name of the split of records that subset.holdout excluded from training."""


def rows_of_split(index: pa.Table, split: str) -> NDArray[np.int64]:
    """Rows of the index that belong to `split`, in the index's order."""
    rows: NDArray[np.int64] = np.flatnonzero(pc.equal(index["split"], split).to_numpy())
    if len(rows) == 0:
        known = ", ".join(sorted(pc.unique(index["split"]).to_pylist()))
        hint = "name one of them"
        if split == "test":
            hint += " (evaluate.splits=), or pack the data with data.test_fraction=0.1, which makes a split test"
        raise ConfigError(f"the store has no split {split!r}; its splits are: {known}; {hint}")
    return rows


def select_training_rows(index: pa.Table, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Select the rows of a split that `subset` describes, in the order of the index.

    Each class is permuted by (subset.seed, class). The first `holdout` records are held out, and the next `shots` are
    selected. Selections with more shots therefore contain those with fewer, and the selection is independent of
    `seed` and of the method. A record with many labels belongs to each of its classes. If one class holds it out, it is
    held out for all, and a class may have more records than its shots because of records selected for other classes.
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
    """Order all rows of a split so that every prefix has nearly the same number of records of each class.

    The order depends only on the keys and the seed. Records without a label, or with many, count as one class.
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
    """Select the rows that `select_training_rows` holds out, independent of the shots, in the order of the index."""
    if subset.holdout == 0:
        raise ConfigError("subset.holdout=0 holds out no records; set it to a number per class")
    chosen = [members[: subset.holdout] for _, members in _permuted_classes(index, split, subset)]
    return np.unique(np.concatenate(chosen))


def _permuted_classes(
    index: pa.Table, split: str, subset: SubsetOptions
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Iterate over the classes of a split with their rows, permuted by (subset.seed, class)."""
    rows = rows_of_split(index, split)
    labels, owners = _labels_of(index, rows)
    if len(np.unique(owners)) < len(rows):
        raise ConfigError(
            f"subset.shots and subset.holdout need labels, but split {split!r} has unlabeled records"
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
    """Return every known label of these rows, and the position among them of the row with that label."""
    if has_many_labels(index):
        lists = index["labels"].take(rows).to_pylist()
        owners = np.repeat(np.arange(len(lists)), [len(labels) for labels in lists])
        return np.array([label for labels in lists for label in labels], np.int64), owners
    labels = index["label"].to_numpy()[rows]
    known = np.flatnonzero(labels != NO_LABEL)
    return labels[known], known
