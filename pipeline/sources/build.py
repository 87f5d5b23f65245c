"""The source that options name, and its plan. A source lists its records at once and reads their bytes one by one.

Reading is a pure function of the record, so that any process may read any shard at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.config.options import resolve_implementation
from pipeline.store.planning import check_keys, plan_shards

if TYPE_CHECKING:
    from pipeline.config.file_data import DataConfig
    from pipeline.config.store import StoreOptions
    from pipeline.core.records import Record, Source
    from pipeline.store.planning import ShardPlan


@runtime_checkable
class InPlaceSource(Protocol):
    """A source whose files may serve as shards where they are."""

    def plan_in_place(self, form: str) -> list[ShardPlan] | None:
        """A shard a file; None where the records are to be packed anew. `form` is store.format."""


def plan_source(source: Source, records: list[Record], config: StoreOptions) -> list[ShardPlan]:
    """The source's shards: its own tars where they can be used in place, new ones otherwise."""
    in_place = source.plan_in_place(config.format) if isinstance(source, InPlaceSource) else None
    if in_place is not None:
        check_keys([record.key for record in records])
        return in_place
    return plan_shards(records, config.shard_size, config.seed)


def build_source(config: DataConfig) -> Source:
    """The source that `data=` names."""
    source: Source = resolve_implementation(type(config))(config)
    return source
