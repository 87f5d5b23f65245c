"""Which split a record belongs to, where its source does not say."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.records import Record

TRAIN = "train"
TEST = "test"


def is_split_name(name: str) -> bool:
    """Whether files may be named after this split: letters, digits, - and _."""
    return re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) is not None


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
