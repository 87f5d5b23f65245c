"""Stored views of a teacher, replayed for a student: drawn once per shard and stored as matrices.

A pass of stored views covers a selection of one split. Its rows are those records in the order of the shards. The
teacher's views use the rounded float32 matrices that are stored, so a student with the same input size receives the
teacher's pixels bit for bit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.augment import AugmentOptions, ViewsConfig
from permafrost.config.options import is_left_out, options_of, resolve_implementation
from permafrost.config.store import SubsetOptions
from permafrost.core.digests import derive_seed
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.subset import select_training_rows
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry


@dataclass(frozen=True, kw_only=True)
class StoredViews:
    """The records that a pass covers, and their views."""

    config: ViewsConfig
    augment: AugmentOptions
    split: str
    subset: SubsetOptions
    rows: RowNumbers
    """Covered rows of the index, ascending."""
    shards: NDArray[np.int64]
    """Numbers of the shards with covered rows, ascending."""
    shifts: str | None = None
    """Units of the shifts, None if they are those of earlier versions (SelectedRecords.identify_shifts)."""

    def rows_of(self, store: Store, shard: ShardEntry) -> NDArray[np.int64]:
        """Return the covered rows of a shard, counted from its beginning, ascending."""
        here = store.rows_of_shard(store.shards.number_of(shard.name))
        if isinstance(self.rows, range):
            covered = np.arange(max(here.start, self.rows.start), min(here.stop, self.rows.stop))
            return covered - here.start
        first, last = np.searchsorted(self.rows, [here.start, here.stop])
        return self.rows[first:last] - here.start

    def position(self, store: Store, shard: ShardEntry) -> int:
        """Return the position of a shard among those with covered rows."""
        return int(np.searchsorted(self.shards, store.shards.number_of(shard.name)))

    @property
    def count(self) -> int:
        """Number V of views per record."""
        return self.config.count

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describe everything that determines the views, as `views` and `selection` of the manifest."""
        views: dict[str, Any] = {
            "count": self.config.count,
            "sampler": self.config.kind,
            "seed": self.config.seed,
        }
        if self.config.kind == "random":
            views["operations"] = [asdict(operation) for operation in self.augment.operations]
            if self.shifts is not None:
                views["shifts"] = self.shifts
        subset = {
            option.name: getattr(self.subset, option.name)
            for option in options_of(SubsetOptions)
            if not is_left_out(option, getattr(self.subset, option.name))
        }
        return views, {"split": self.split, "subset": subset}

    def matrices(self, store: Store, shard: ShardEntry) -> Tensor:
        """Draw canonical_from_view of the shard's covered records, f32 [n, V, 3, 3].

        Views are drawn for all records of the shard, so those of a record do not depend on the selection.
        """
        draw = resolve_implementation(type(self.config))
        drawn: Tensor = draw(self.config, self.augment, store, shard)
        return drawn[torch.from_numpy(self.rows_of(store, shard))]


def draw_random(
    config: ViewsConfig, augment: AugmentOptions, store: Store, shard: ShardEntry
) -> Tensor:
    """Draw canonical_from_view of all records of a shard from `augment.operations`, f32 [n, V, 3, 3]."""
    here = store.rows_of_shard(store.shards.number_of(shard.name))
    sizes = store.index.take(("height", "width"), here)
    heights, widths = (torch.tensor(sizes[n].tolist()) for n in ("height", "width"))
    aspects = widths / heights
    height, width = store.size
    schedule = ViewSchedule(
        augment,
        store.size,
        derive_seed(config.seed, "stored views", shard.name),
        one_aspect=bool((aspects == width / height).all()),
    )
    drawn = [schedule.views(view, 0, aspects) for view in range(config.count)]
    whole = torch.eye(3).expand(len(aspects), 3, 3)
    return torch.stack([whole if v is None else v for v in drawn], dim=1)


def plan_stored_views(
    store: Store, config: ViewsConfig, augment: AugmentOptions, split: str, subset: SubsetOptions
) -> StoredViews:
    """Plan the stored views of a split's selection.

    Raises:
        ConfigError: If there is no such split, or the selection asks for more records than a class has.
    """
    selected = select_training_rows(store.index, split, subset)
    starts = store.shards.starts
    numbers = store.index.shards_of(selected)
    return StoredViews(
        config=config,
        augment=augment,
        split=split,
        subset=subset,
        rows=selected,
        shards=numbers[starts[numbers + 1] > starts[numbers]],
        shifts=SelectedRecords(store, selected).identify_shifts(augment),
    )
