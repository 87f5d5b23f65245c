"""Assignment of records to shards, planned before anything is read and independent of timing."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError
from pipeline.core.files import sha256_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.core.records import Record

MAX_KEY_BYTES = 200


@dataclass(frozen=True)
class ShardPlan:
    """Planned shard: its position in the store, its name and its records in order."""

    position: int
    name: str
    split: str
    records: tuple[Record, ...]
    reference: str | None = None
    """Path of an external tar that already contains the records and is indexed in place."""

    @property
    def keys_sha256(self) -> str:
        """SHA-256 of the planned keys, including those of records that cannot be packed."""
        return sha256_keys([record.key for record in self.records])


def plan_shards(records: Iterable[Record], shard_size: int, seed: int) -> list[ShardPlan]:
    """Divide each split into shards along a global, seeded permutation of its keys.

    The permutation orders keys by a hash of (seed, key). A class-sorted source therefore gives mixed shards, and
    the plan depends neither on the source's order nor on any library's random numbers.
    """
    by_split: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: _rank(record.key, seed)):
        by_split.setdefault(record.split, []).append(record)
    check_keys([record.key for split in by_split.values() for record in split])
    named = (
        (split, f"{split}-{number:06d}", shard)
        for split in sorted(by_split)
        for number, shard in enumerate(_chunks(by_split[split], shard_size))
    )
    return [
        ShardPlan(position, name, split, shard)
        for position, (split, name, shard) in enumerate(named)
    ]


def find_unmixed_shard(plans: Sequence[ShardPlan]) -> ShardPlan | None:
    """Return the first shard with less than half of the classes expected in a random draw from its split."""
    by_split: dict[str, list[ShardPlan]] = {}
    for plan in plans:
        by_split.setdefault(plan.split, []).append(plan)
    for members in by_split.values():
        counts = Counter(record.label for plan in members for record in plan.records)
        total = counts.total()
        for plan in members:
            size = len(plan.records)
            expected = sum(1 - (1 - count / total) ** size for count in counts.values())
            if len({record.label for record in plan.records}) < expected / 2:
                return plan
    return None


def _chunks(records: list[Record], size: int) -> list[tuple[Record, ...]]:
    return [tuple(records[start : start + size]) for start in range(0, len(records), size)]


def _rank(key: str, seed: int) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16, salt=seed.to_bytes(8, "little")).digest()


def check_keys(keys: list[str]) -> None:
    """Raise ConfigError unless every key is well formed and unique."""
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
