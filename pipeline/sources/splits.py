"""Which split a record belongs to, where its source does not say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.core.records import Record

TRAIN = "train"
TEST = "test"


def is_split_name(name: str) -> bool:
    """Whether files may be named after this split: letters, digits, - and _."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) is not None


def split_of(value: str, names: Mapping[str, str], error: Callable[[str], ConfigError]) -> str:
    """The split that a table's cell means.

    names  of data.split_names; empty takes the values as they are
    error  of a complaint about that cell
    """
    if names and value not in names:
        raise error(f"data.split_names has no {value!r}; it has: {', '.join(names)}")
    split = names.get(value, value)
    if not is_split_name(split):
        raise error(
            f"the split {split!r} must have only letters, digits, - and _; rename it by data.split_names"
        )
    return split


def split_off_test(records: Sequence[Record], fraction: float) -> list[Record]:
    """The records, of which those of split train whose key's hash falls below `fraction` go to test.

    A pure function of each key: records that come or go move no other.
    """
    if fraction == 0:
        return list(records)
    if any(record.split == TEST for record in records):
        raise ConfigError(
            f"data.test_fraction={fraction}, but the data have a split {TEST} already; set it to 0"
        )
    return [
        replace(record, split=TEST)
        if record.split == TRAIN and _position(record.key) < fraction
        else record
        for record in records
    ]


def _position(key: str) -> float:
    """In [0, 1)."""
    digest = hashlib.blake2b(key.encode(), digest_size=6, person=b"test_fraction").digest()
    return int.from_bytes(digest, "big") / 2**48
