"""Facts about the records of a selection that the index of its store has: labels, keys, sizes, regions.

Whatever is asked of all records is looked through in blocks, and lies in the mapped index where it is a column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import NO_LABEL
from permafrost.loading.sampler import WINDOW_SHARDS
from permafrost.store.frames import labels_of_rows
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store

_BLOCK = 2**18
"""Records whose values are held at once when a whole selection is looked through."""


class SelectedRecords:
    """Rows of a store's index, in any order. A position is a place among them."""

    def __init__(self, store: Store, rows: RowNumbers, *, labels_apply: bool = True) -> None:
        """Select rows: a range where possible, which needs no memory, or any row numbers.

        Args:
            store: Store of the records.
            rows: Rows of its index.
            labels_apply: False if the classes of the data are not those of the network that uses the labels, which then
                have no meaning for it.
        """
        self.store, self.rows, self.labels_apply = store, rows, labels_apply

    def __repr__(self) -> str:
        """Describe how many records of which store they are."""
        return f"<{type(self).__name__}: {len(self.rows):,} of {self.store!r}>"

    def rows_at(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the index at these positions of the selection."""
        return at + self.rows.start if isinstance(self.rows, range) else self.rows[at]

    def find_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of rows of the index in an ascending selection, i64 [n], -1 for those not selected."""
        if isinstance(self.rows, range):
            at = rows - self.rows.start
            return np.where((at >= 0) & (at < len(self.rows)), at, -1)
        at = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        return np.where(self.rows[at] == rows, at, -1)

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

        Raises:
            ValueError: If the rows are not ascending; the order of an epoch is defined for ascending rows.
        """
        starts = self.store.shards.starts
        if isinstance(self.rows, range):
            return np.clip(starts, self.rows.start, self.rows.stop) - self.rows.start
        require(
            self._ascending_rows is self.rows,
            "the rows of a training must be ascending",
            ValueError,
        )
        return np.searchsorted(self.rows, starts)

    @property
    def least_window(self) -> int:
        """Number of records that are permuted together, 0 for those of any WINDOW_SHARDS shards.

        Shards of later generations may be small, so it is then that of WINDOW_SHARDS full ones.
        """
        if self.store.num_generations == 1:
            return 0
        starts = self.store.shards.starts
        return -(-WINDOW_SHARDS * int(np.diff(starts).max()) * len(self) // int(starts[-1]))

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, positions: Sequence[int] | None = None) -> torch.Tensor:
        """Read (height, width) of original images, i64 [n, 2], NO_SIZE for rows of a table; None reads all of them."""
        rows = self.rows if positions is None else self.rows_at(np.asarray(positions, np.int64))
        sizes = self.store.index.take(("height", "width"), rows)
        return torch.from_numpy(np.stack([sizes["height"], sizes["width"]], axis=1)).long()

    def _aspects(self, rows: RowNumbers) -> NDArray[np.float64]:
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

    def _blocks(self) -> Iterator[RowNumbers]:
        """Iterate over the rows of the selection in blocks of limited size."""
        yield from (self.rows[start : start + _BLOCK] for start in range(0, len(self), _BLOCK))

    @cached_property
    def label_numbers(self) -> NDArray[np.integer[Any]]:
        """Label of every record, [n], NO_LABEL where unknown; of a range a read-only view of the mapped index."""
        if not self.labels_apply:
            return np.broadcast_to(np.int64(NO_LABEL), (len(self),))
        return self.store.index.values("label", self.rows)

    def classes_to_draw(self, sampling: str) -> dict[str, NDArray[np.integer[Any]]]:
        """Return the class and the group of each record, `label` and `group`, by which they are drawn for an epoch.

        Args:
            sampling: Option trainer.sampling, for messages.

        Raises:
            ConfigError: If the data have no classes, or several for a record.
        """
        columns = self.store.index.take(("label", "group"), self.rows)
        require(
            bool((columns["label"] != NO_LABEL).any()) and not self.store.manifest.multi_label,
            f"trainer.sampling={sampling} draws records by their class, but "
            f"{'a record may have several' if self.store.manifest.multi_label else 'no record has one'}; set it to "
            "uniform, and weigh the records by a column of numbers (data.weight=) when you pack them",
        )
        return columns

    def relative_weights(self) -> torch.Tensor | None:
        """Return the weight of each record by their mean, f32 [n]; None if all have the same.

        Raises:
            ConfigError: If all weights are 0, or one is not a finite number >= 0.
        """
        weights = self.store.index.values("weight", self.rows)
        low, mean, high = weights.min(), weights.mean(dtype=np.float64), weights.max()
        require(
            0 <= low <= mean < np.inf and mean > 0,
            f"{self.store.path}: the weights of the {len(self):,} records (data.weight) are from {low} to {high}; "
            "select records of which one has a finite weight above 0, or pack the data without data.weight",
        )
        return None if low == high else torch.from_numpy(weights / mean).float()

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
        requested = set(keys)
        rows = self.rows
        if isinstance(rows, range):
            rows_by_key = self.store.index.rows_of_keys(requested, rows)
            return {key: row - rows.start for key, row in rows_by_key.items()}
        return {key: place for place, key in enumerate(self.keys_at()) if key in requested}

    @property
    def has_masks(self) -> bool:
        """True if any record has a mask."""
        return any(
            bool(self.store.index.values("mask_size", rows).any()) for rows in self._blocks()
        )

    @property
    def has_boxes(self) -> bool:
        """True if any record has a box."""
        return any(
            bool(self.store.index.list_lengths("boxes", rows).any()) for rows in self._blocks()
        )

    def labels_at(self, at: NDArray[np.int64]) -> torch.Tensor:
        """Read the labels of these positions without reading images: i64 [n], or f32 [n, K] for many labels."""
        if not self.labels_apply:
            return torch.full((len(at),), NO_LABEL)
        return labels_of_rows(self.store, self.rows_at(at))
