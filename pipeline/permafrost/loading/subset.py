"""Selection of the rows of a store that a run reads. The store itself always contains the whole set."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from permafrost.config.store import SubsetOptions
from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, quote, require, shorten
from permafrost.core.records import NO_CLASS, NO_GROUP, NO_LABEL

if TYPE_CHECKING:
    from permafrost.store.index import RecordIndex, RowNumbers

logger = logging.getLogger("permafrost.subset")

HOLDOUT = "holdout"
"""Name of the split of records that subset.holdout excluded from training."""


def rows_of_split(index: RecordIndex, split: str) -> RowNumbers:
    """Return the rows of the index that belong to `split`, a range if its shards follow each other.

    Raises:
        ConfigError: If the store has no record of this split.
    """
    numbers = index.shards.splits.get(split, np.empty(0, np.int64))
    starts = index.shards.starts
    if not (starts[numbers + 1] > starts[numbers]).any():
        records = index.shards.records_of_splits()
        known = ", ".join(sorted(name for name, number in records.items() if number))
        hint = "name one of them"
        if split == "test":
            hint += " (evaluate.splits=), or pack the data with data.test_fraction=0.1, which makes a split test"
        raise ConfigError(f"the store has no split {split!r}; its splits are: {known}; {hint}")
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return range(int(starts[numbers[0]]), int(starts[numbers[-1] + 1]))
    return np.concatenate([np.arange(starts[number], starts[number + 1]) for number in numbers])


def _known_rows(index: RecordIndex, split: str) -> RowNumbers:
    """Return the rows of a split without those of classes that the network does not know."""
    rows = rows_of_split(index, split)
    is_later = index.later_labels(rows) >= 0
    return rows_at(rows, np.flatnonzero(~is_later)) if is_later.any() else rows


def select_training_rows(index: RecordIndex, split: str, subset: SubsetOptions) -> RowNumbers:
    """Select the rows of a split that `subset` describes, ascending.

    Each class is ordered by subset.rule. The first `holdout` records are held out, with all of their groups if
    subset.keep_groups is set, and the next `shots` are selected.
    Selections with more shots therefore contain those with fewer, and the selection is independent of
    `seed` and of the method. A record with many labels belongs to each of its classes. If one class holds it out, it is
    held out for all, and a class may have more records than its shots because of records selected for other classes.

    Args:
        index: Index of the store.
        split: Name of the split.
        subset: Options of the selection.

    Raises:
        ConfigError: If there is no such split, a class has too few records or none is left for training, or a record
            has no label where shots or a holdout need one.
    """
    if subset.shots is None and subset.holdout == 0:
        return _known_rows(index, split)
    held_out = (
        select_holdout_rows(index, split, subset) if subset.holdout else np.empty(0, np.int64)
    )
    if subset.shots is None:
        return _without(np.asarray(_known_rows(index, split)), held_out)
    chosen = []
    for label, members in _ordered_classes(index, split, subset):
        members = _without(members, held_out)
        require(
            len(members) >= subset.shots or label == NO_CLASS,
            f"subset.shots={subset.shots}, but class {quote(index.classes[label])} of split {split!r} has "
            f"{len(members)} records after the holdout; lower subset.shots or subset.holdout",
        )
        chosen.append(members[: subset.shots])
    return np.unique(np.concatenate(chosen))


def select_holdout_rows(index: RecordIndex, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Select the rows that `select_training_rows` holds out, independent of the shots, in the order of the index.

    Raises:
        ConfigError: If `subset` holds out no records, or all of a class, or a record has no label.
    """
    require(
        subset.holdout != 0, "subset.holdout=0 holds out no records; set it to a number per class"
    )

    def lost_with(holdout: int) -> dict[int, int]:
        rows = _held_out(index, split, replace(subset, holdout=holdout))
        return _emptied_classes(index, split, rows)

    held_out = _held_out(index, split, subset)
    emptied = _emptied_classes(index, split, held_out)
    unavoidable = lost_with(1) if emptied else {}
    if unavoidable:
        _warn_once(
            f"subset.holdout leaves no training record of {len(unavoidable):,} small classes of split {split}, "
            f"whatever its value: {shorten([index.classes[label] for label in unavoidable], 5)}"
        )
    lost = emptied.keys() - unavoidable.keys()
    if lost:
        # A smaller holdout is a part of a larger one.
        fits = bisect_left(
            range(1, subset.holdout), True, key=lambda number: bool(lost_with(number).keys() & lost)
        )
        label = min(lost)
        raise ConfigError(
            f"subset.holdout={subset.holdout} holds out all {emptied[label]} records of class "
            f"{quote(index.classes[label])} of split {split!r}"
            f"{', with their whole groups' if subset.keep_groups else ''}, so that none is left for training; set "
            f"subset.holdout={fits} or less, or add records of the class"
        )
    return held_out


def members_of_classes(
    labels: NDArray[np.integer[Any]], owners: NDArray[np.int64] | None = None
) -> dict[int, NDArray[np.int64]]:
    """Group the owners of labels by label: each class's owners, ascending, in the order of the classes.

    Args:
        labels: Any labels, [n].
        owners: Owner of each label, [n], who may have several labels, or one of them twice; None stands for the
            positions of the labels.
    """
    order = np.argsort(labels, kind="stable")
    known, sizes = np.unique(labels, return_counts=True)
    groups = np.split(order, np.cumsum(sizes)[:-1]) if len(known) else []
    return {
        int(label): group if owners is None else np.unique(owners[group])
        for label, group in zip(known, groups, strict=True)
    }


def _held_out(index: RecordIndex, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Rows of the first `holdout` records of each class, with their groups for subset.keep_groups, ascending."""
    chosen = [members[: subset.holdout] for _, members in _ordered_classes(index, split, subset)]
    held_out = np.unique(np.concatenate(chosen))
    if not subset.keep_groups:
        return held_out
    rows = _known_rows(index, split)
    groups = index.values("group", rows)
    require(
        bool((groups != NO_GROUP).any()),
        f"subset.keep_groups=true holds out whole groups, but split {split!r} has none; pack the data with data.group",
    )
    if blank := int((groups == NO_GROUP).sum()):
        _warn_once(
            f"{blank:,} of {len(groups):,} records of split {split} have no group: each is a group of its own, so one "
            "patient's may be in the holdout and in the training"
        )
    numbers = np.unique(index.values("group", held_out))
    positions = np.flatnonzero(np.isin(groups, numbers[numbers != NO_GROUP]))
    together: NDArray[np.int64] = np.union1d(held_out, rows_at(rows, positions))
    return together


@lru_cache
def _warn_once(text: str) -> None:
    """Log a warning of a selection, which a command makes several times."""
    logger.warning("%s", text)


def _emptied_classes(index: RecordIndex, split: str, held_out: NDArray[np.int64]) -> dict[int, int]:
    """Return the classes of which a holdout takes all records, and their numbers of records."""
    rows = _known_rows(index, split)
    return {
        label: len(members)
        for label, members in _classes_of(index, rows, split).items()
        if label != NO_CLASS and not len(_without(rows_at(rows, members), held_out))
    }


def _ordered_classes(
    index: RecordIndex, split: str, subset: SubsetOptions
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Iterate over the classes of a split with their rows in the order of subset.rule.

    The rule permutation is a random permutation, seeded by (subset.seed, class), of the rows in the order of their
    keys, and by_key orders them by digests of (subset.seed, key).
    """
    rows = _known_rows(index, split)
    digests = None
    if subset.rule == "by_key" or (subset.rule == "auto" and index.has_generations):
        seed = derive_seed(subset.seed, "subset by key")
        digests = index.key_digests(np.asarray(rows, np.int64), seed)
    for label, members in _classes_of(index, rows, split).items():
        members = members[index.key_order(rows_at(rows, members))]
        if digests is None:
            seed = derive_seed(subset.seed, "subset", label)
            members = np.random.default_rng(seed).permutation(members)
        else:
            members = members[np.argsort(digests[members], kind="stable")]
        yield label, rows_at(rows, members)


def _classes_of(index: RecordIndex, rows: RowNumbers, split: str) -> dict[int, NDArray[np.int64]]:
    """Group the positions of these rows by class; records known to have none are a class of their own, NO_CLASS.

    Raises:
        ConfigError: If the labels of one of them are unknown.
    """
    if index.has_many_labels:
        labels, lengths = index.label_lists(rows)
        all_labeled = bool(lengths.all())
        owners = np.repeat(np.arange(len(lengths)), lengths)
        is_class = labels > NO_CLASS
        without = np.setdiff1d(np.arange(len(lengths)), owners[is_class])
        owners = np.concatenate([owners[is_class], without])
        labels = np.concatenate([labels[is_class], np.full(len(without), NO_CLASS)])
    else:
        labels, owners = index.values("label", rows), None
        all_labeled = bool((labels != NO_LABEL).all())
    require(
        all_labeled,
        f"subset.shots and subset.holdout need labels, but split {split!r} has unlabeled records",
    )
    return members_of_classes(labels, owners)


def _without(rows: NDArray[np.int64], excluded: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that are not among `excluded`, which are ascending, in their order."""
    if len(excluded) == 0:
        return rows
    places = np.minimum(np.searchsorted(excluded, rows), len(excluded) - 1)
    remaining: NDArray[np.int64] = rows[excluded[places] != rows]
    return remaining


def rows_at(rows: RowNumbers, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows at these positions of a range or an array of rows."""
    return positions + rows.start if isinstance(rows, range) else rows[positions]
