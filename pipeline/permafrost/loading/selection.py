"""Selection of the rows that a run reads: splits, shots, holdout, and the records of a selection.

Whatever is asked of all records is read in blocks, and lies in the mapped index where it is a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.core.errors import ConfigError
from permafrost.core.records import NO_LABEL
from permafrost.core.seeds import derive_seed
from permafrost.store.frames import labels_of_rows
from permafrost.store.index import Rows
from permafrost.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.config.store import SubsetOptions
    from permafrost.store.index import RecordIndex, Rows


_ROWS_AT_ONCE = 2**18
"""Records whose values are held at once when a whole selection is looked through."""


class SelectedRecords:
    """Rows of a store's index, in any order. A position is a place among them."""

    def __init__(self, store: Store, rows: Rows, *, labels_apply: bool = True) -> None:
        """Select rows: a range where possible, which needs no memory, or any row numbers.

        labels_apply  False if the classes of the data are not those of the network that uses the labels, which then
                      have no meaning for it
        """
        self.store = store
        self.rows = rows
        self.labels_apply = labels_apply

    def rows_at(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the index at these positions of the selection."""
        return at + self.rows.start if isinstance(self.rows, range) else self.rows[at]

    def rows_in_shard(self, number: int) -> NDArray[np.int64]:
        """Return the selected rows of a shard, counted from its beginning, ascending."""
        here = self.store.rows_of_shard(number)
        if isinstance(self.rows, range):
            return (
                np.arange(max(self.rows.start, here.start), min(self.rows.stop, here.stop))
                - here.start
            )
        rows = self._ascending_rows
        return (
            rows[np.searchsorted(rows, here.start) : np.searchsorted(rows, here.stop)] - here.start
        )

    @cached_property
    def _ascending_rows(self) -> NDArray[np.int64]:
        assert not isinstance(self.rows, range)
        return self.rows if (self.rows[1:] > self.rows[:-1]).all() else np.unique(self.rows)

    def first_positions(self) -> NDArray[np.int64]:
        """Return the position at which the records of each shard begin, and their number at the end: [shards + 1].

        Raises ValueError if the rows are not ascending; the order of an epoch is defined for ascending rows.
        """
        starts = self.store.shards.starts
        if isinstance(self.rows, range):
            return np.clip(starts, self.rows.start, self.rows.stop) - self.rows.start
        if self._ascending_rows is not self.rows:
            raise ValueError("the rows of a training must be ascending")
        return np.searchsorted(self.rows, starts)

    def __len__(self) -> int:
        return len(self.rows)

    def aspects(self, positions: Sequence[int] | None = None) -> torch.Tensor:
        """Read width / height of original images, f64 [n], 1 for rows of a table; None reads all of them."""
        rows = self.rows if positions is None else self.rows_at(np.asarray(positions, np.int64))
        return torch.from_numpy(self._aspects(rows))

    def _aspects(self, rows: Rows) -> NDArray[np.float64]:
        sizes = self.store.index.take(("width", "height"), rows)
        aspects: NDArray[np.float64] = sizes["width"] / sizes["height"]
        return aspects

    @property
    def has_frame_aspect(self) -> bool:
        """True if all original images have the aspect ratio of the canonical frame."""
        height, width = self.store.size
        return all(bool((self._aspects(rows) == width / height).all()) for rows in self._blocks())

    @property
    def has_many_labels(self) -> bool:
        """True if records have many labels, so that labels of a batch are f32 [B, K]."""
        return self.store.manifest.multi_label and self.labels_apply

    @property
    def has_labels(self) -> bool:
        """True if any record has a label among the classes of the network."""
        if not self.labels_apply:
            return False
        index = self.store.index
        if self.has_many_labels:
            return any(index.list_lengths("labels", rows).any() for rows in self._blocks())
        return any((index.values("label", rows) != NO_LABEL).any() for rows in self._blocks())

    def _blocks(self) -> Iterator[Rows]:
        """Iterate over the rows of the selection in blocks of limited size."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield self.rows[start : start + _ROWS_AT_ONCE]

    @cached_property
    def label_numbers(self) -> NDArray[np.integer[Any]]:
        """Label of every record, [n], NO_LABEL where unknown; of a range a read-only view of the mapped index."""
        if not self.labels_apply:
            return np.broadcast_to(np.int64(NO_LABEL), (len(self),))
        return self.store.index.values("label", self.rows)

    def label_lists(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the labels of all records of a multi-label store, one after another, and their number per record."""
        return self.store.index.label_lists(self.rows)

    def keys_at(self, positions: Sequence[int] | NDArray[np.int64] | None = None) -> list[str]:
        """Return the keys at these positions; None returns all of them."""
        if positions is None:
            return self.store.index.keys(self.rows)
        return self.store.index.keys(self.rows_at(np.asarray(positions, np.int64)))

    def positions_of(self, keys: Iterable[str]) -> dict[str, int]:
        """Find the positions of the given keys; keys that no selected record has are left out."""
        wanted = set(keys)
        rows = self.rows
        if isinstance(rows, range):
            found = self.store.index.rows_of_keys(wanted, rows)
            return {key: row - rows.start for key, row in found.items()}
        return {key: place for place, key in enumerate(self.keys_at()) if key in wanted}

    @property
    def has_masks(self) -> bool:
        """True if any record has a mask."""
        index = self.store.index
        return any(bool(index.values("mask_size", rows).any()) for rows in self._blocks())

    @property
    def has_boxes(self) -> bool:
        """True if any record has a box."""
        index = self.store.index
        return any(bool(index.list_lengths("boxes", rows).any()) for rows in self._blocks())

    def labels_at(self, at: NDArray[np.int64]) -> torch.Tensor:
        """Read the labels of these positions without reading images: i64 [n], or f32 [n, K] for many labels."""
        if not self.labels_apply:
            return torch.full((len(at),), NO_LABEL)
        return labels_of_rows(self.store, self.rows_at(at))


# ---- selection -------------------------------------------------------------------------------------


_LABELS_AT_ONCE = 2**20
HOLDOUT = "holdout"
"""Name of the split of records that subset.holdout excluded from training."""


def rows_of_split(index: RecordIndex, split: str) -> Rows:
    """Return the rows of the index that belong to `split`, a range if its shards follow each other."""
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
    return np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers])


def select_training_rows(index: RecordIndex, split: str, subset: SubsetOptions) -> Rows:
    """Select the rows of a split that `subset` describes, ascending.

    Each class is permuted by (subset.seed, class). The first `holdout` records are held out, and the next `shots` are
    selected. Selections with more shots therefore contain those with fewer, and the selection is independent of
    `seed` and of the method. A record with many labels belongs to each of its classes. If one class holds it out, it is
    held out for all, and a class may have more records than its shots because of records selected for other classes.
    """
    if subset.shots is None and subset.holdout == 0:
        return rows_of_split(index, split)
    held_out = _held_out(index, split, subset) if subset.holdout else np.empty(0, np.int64)
    if subset.shots is None:
        return _without(np.asarray(rows_of_split(index, split)), held_out)
    chosen = []
    for label, members in _permuted_classes(index, split, subset):
        members = _without(members, held_out)
        if len(members) < subset.shots:
            raise ConfigError(
                f"subset.shots={subset.shots}, but class {label} of split {split!r} has "
                f"{len(members)} records after the holdout"
            )
        chosen.append(members[: subset.shots])
    return np.unique(np.concatenate(chosen))


def count_training_rows(index: RecordIndex, split: str, subset: SubsetOptions) -> int:
    """Return the number of rows of `select_training_rows`, without selecting them where the class sizes suffice."""
    rows = rows_of_split(index, split)
    if subset.shots is None and subset.holdout == 0:
        return len(rows)
    sizes = np.zeros(0, np.int64)
    for start in range(0, len(rows), _LABELS_AT_ONCE):
        labels = index.values("label", rows[start : start + _LABELS_AT_ONCE])
        own = np.bincount(labels[labels != NO_LABEL], minlength=len(sizes))
        own[: len(sizes)] += sizes
        sizes = own
    sizes = sizes[sizes > 0]
    least = subset.holdout + (subset.shots or 0)
    if index.has_many_labels or sizes.sum() < len(rows) or sizes.min(initial=least) < least:
        return len(select_training_rows(index, split, subset))
    return int(
        len(rows) - subset.holdout * len(sizes)
        if subset.shots is None
        else subset.shots * len(sizes)
    )


def balanced_order(index: RecordIndex, split: str, seed: int) -> NDArray[np.int64]:
    """Order all rows of a split so that every prefix has nearly the same number of records of each class.

    The order depends only on the keys and the seed. Records without a label, or with many, count as one class.
    """
    rows = rows_of_split(index, split)
    labels = index.values("label", rows)
    turns = np.empty(len(rows), np.int64)
    for label, members in members_of_classes(labels).items():
        members = members[index.key_order(_at(rows, members))]
        random = np.random.default_rng(derive_seed(seed, "balanced order", label))
        turns[random.permutation(members)] = np.arange(len(members))
    return _at(rows, np.lexsort((labels, turns)))


def select_holdout_rows(index: RecordIndex, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Select the rows that `select_training_rows` holds out, independent of the shots, in the order of the index."""
    if subset.holdout == 0:
        raise ConfigError("subset.holdout=0 holds out no records; set it to a number per class")
    return _held_out(index, split, subset)


def members_of_classes(
    labels: NDArray[np.integer[Any]], owners: NDArray[np.int64] | None = None
) -> dict[int, NDArray[np.int64]]:
    """Group the owners of labels by label: each class's owners, ascending, in the order of the classes.

    labels  any labels, [n]
    owners  what has each label, [n]; an owner may have several labels, or one of them twice. None stands for the
            positions of the labels
    """
    order = np.argsort(labels, kind="stable")
    known, sizes = np.unique(labels, return_counts=True)
    groups = np.split(order, np.cumsum(sizes)[:-1]) if len(known) else []
    return {
        int(label): group if owners is None else np.unique(owners[group])
        for label, group in zip(known, groups, strict=True)
    }


def _held_out(index: RecordIndex, split: str, subset: SubsetOptions) -> NDArray[np.int64]:
    """Rows of the first `holdout` records of each class, ascending."""
    chosen = [members[: subset.holdout] for _, members in _permuted_classes(index, split, subset)]
    return np.unique(np.concatenate(chosen))


def _permuted_classes(
    index: RecordIndex, split: str, subset: SubsetOptions
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Iterate over the classes of a split with their rows, permuted by (subset.seed, class)."""
    rows = rows_of_split(index, split)
    for label, members in _classes_of(index, rows, split).items():
        members = members[index.key_order(_at(rows, members))]
        if len(members) < subset.holdout:
            raise ConfigError(
                f"subset.holdout={subset.holdout}, but class {label} of split {split!r} has "
                f"{len(members)} records"
            )
        seed = derive_seed(subset.seed, "subset", label)
        yield label, _at(rows, np.random.default_rng(seed).permutation(members))


def _classes_of(index: RecordIndex, rows: Rows, split: str) -> dict[int, NDArray[np.int64]]:
    """Group the positions of these rows by class. Raises ConfigError if one of them has no label."""
    if index.has_many_labels:
        labels, lengths = index.label_lists(rows)
        all_labeled = bool(lengths.all())
        owners = np.repeat(np.arange(len(lengths)), lengths)
    else:
        labels, owners = index.values("label", rows), None
        all_labeled = bool((labels != NO_LABEL).all())
    if not all_labeled:
        raise ConfigError(
            f"subset.shots and subset.holdout need labels, but split {split!r} has unlabeled records"
        )
    return members_of_classes(labels, owners)


def _without(rows: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that are not among `others`, which are ascending, in their order."""
    if len(others) == 0:
        return rows
    places = np.minimum(np.searchsorted(others, rows), len(others) - 1)
    remaining: NDArray[np.int64] = rows[others[places] != rows]
    return remaining


def _at(rows: Rows, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return positions + rows.start if isinstance(rows, range) else rows[positions]
