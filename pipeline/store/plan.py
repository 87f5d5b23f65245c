"""Which record goes into which shard: planned before anything is read, never an accident of timing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import Record

MAX_KEY_BYTES = 200


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its position in the store, its name and its records in their order."""

    position: int
    name: str
    split: str
    records: tuple[Record, ...]


def plan_shards(records: Iterable[Record], shard_size: int, seed: int) -> list[ShardPlan]:
    """Cut each split into shards along a global, seeded permutation of its keys.

    The permutation orders keys by a hash of (seed, key): a class-sorted source gives mixed shards, and
    the plan depends neither on the source's order nor on any library's random numbers.
    """
    by_split: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: _rank(record.key, seed)):
        by_split.setdefault(record.split, []).append(record)
    _check_keys([record.key for split in by_split.values() for record in split])
    named = (
        (split, f"{split}-{number:06d}", shard)
        for split in sorted(by_split)
        for number, shard in enumerate(_chunks(by_split[split], shard_size))
    )
    return [
        ShardPlan(position, name, split, shard)
        for position, (split, name, shard) in enumerate(named)
    ]


def _chunks(records: list[Record], size: int) -> list[tuple[Record, ...]]:
    return [tuple(records[start : start + size]) for start in range(0, len(records), size)]


def _rank(key: str, seed: int) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16, salt=seed.to_bytes(8, "little")).digest()


def _check_keys(keys: list[str]) -> None:
    if not keys:
        raise ConfigError("the source lists no records; check data.path")
    for key in keys:
        if not key or len(key.encode()) > MAX_KEY_BYTES or set(key) & set("./\\"):
            raise ConfigError(
                f"record key {key!r} must have 1 to {MAX_KEY_BYTES} bytes and no dots or slashes"
            )
    for first, second in pairwise(sorted(keys)):
        if first == second:
            raise ConfigError(
                f"two records have the key {first!r}; keys must be unique over all splits"
            )
