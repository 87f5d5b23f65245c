"""Construction and planning of the source that the options name.

A source lists all its records at once and reads their bytes one by one. Reading is a pure function of the record, so
any process may read any shard at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.config.file_data import FileDataConfig
from pipeline.config.options import resolve_implementation
from pipeline.sources.class_subset import ClassSubset
from pipeline.store.planning import check_keys, plan_shards

if TYPE_CHECKING:
    from pipeline.config.file_data import DataConfig
    from pipeline.config.store import StoreOptions
    from pipeline.core.records import Record, Source
    from pipeline.store.planning import ShardPlan


@runtime_checkable
class InPlaceSource(Protocol):
    """Source whose files may serve as shards in place."""

    def plan_in_place(self, form: str) -> list[ShardPlan] | None:
        """Plan one shard per file; None if the records have to be packed again. `form` is store.format."""


def plan_source(source: Source, records: list[Record], config: StoreOptions) -> list[ShardPlan]:
    """Plan the source's shards: its own tars if they can be used in place, new ones otherwise."""
    in_place = source.plan_in_place(config.format) if isinstance(source, InPlaceSource) else None
    if in_place is not None:
        check_keys([record.key for record in records])
        return in_place
    return plan_shards(records, config.shard_size, config.seed)


def build_source(config: DataConfig) -> Source:
    """Build the source that `data=` names."""
    source: Source = resolve_implementation(type(config))(config)
    if isinstance(config, FileDataConfig) and config.only_classes:
        return ClassSubset(source, config.only_classes)
    return source
