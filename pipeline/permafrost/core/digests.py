"""JSON values, digests of them and of keys, and seeds, which are digests of what they are for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
SHORT = 8
"""Number of hexadecimal digits of a fingerprint in the name of a folder."""


def plain_values(values: Any) -> Any:
    """Return values as JSON has them, with null for NaN and infinite numbers, of which JSON has none."""
    return json.loads(json.dumps(values), parse_constant=lambda name: None)


def canonical_json(value: Any) -> bytes:
    """Return the canonical text of a JSON value: sorted keys, no white space, also of file names that are not UTF-8."""
    return _CANONICAL.encode(value).encode("utf-8", "surrogatepass")


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of the canonical text of a JSON value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_keys(keys: Iterator[str] | list[str]) -> str:
    """Return the SHA-256 of record keys in their order. Equal digests mean equal rows."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def derive_seed(*parts: object) -> int:
    """Return a 32-bit seed for each purpose from any parts, the first of which is usually the seed of the run.

    The CPU generator of torch ignores the bits above 32.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")
