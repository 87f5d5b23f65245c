"""Entries of manifests, built from plain values with a check of every type, digest and range."""

from __future__ import annotations

import re
from dataclasses import dataclass

from permafrost.core.errors import UserError
from permafrost.core.json_entries import require_digest, require_entry, require_inside
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath

_AGAIN = (
    "run permafrost precompute again (or ingest, for targets of others), which writes missing files"
)
REPAIR = _AGAIN
"""Advice for a missing file of the store."""
REWRITE = f"delete it and {_AGAIN}"
"""Advice for a damaged file of the store."""
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Pattern of the names of shards and fields."""


class ManifestError(UserError, ValueError):
    """Store, or a part of it, that is damaged, incomplete or of another version."""


def damage_error(path: AnyPath, sha256: str | None, message: str) -> ManifestError:
    """Return the error to raise for a damaged file.

    Args:
        path: The damaged file.
        sha256: Digest of the file in its manifest; None if it is not known.
        message: Text of the error.

    Raises:
        FileError: If not the file is damaged but the local copy of it.
    """
    file_at(path).refuse_damaged_copy(sha256)
    return ManifestError(message)


class StoreMismatchError(UserError, ValueError):
    """Store that is intact but does not match the config."""


def require_shard_name(name: str) -> None:
    """Check that files may be named after a shard.

    Raises:
        EntryError: If they may not.
    """
    require_entry(NAME_PATTERN.fullmatch(name) is not None, f"{name[:80]!r} is not a shard name")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """File of the manifest's folder."""

    path: str
    """Path relative to the manifest's folder."""
    bytes: int
    sha256: str
    crc32c: int = 0
    """CRC-32C (Castagnoli), checked by readers of the whole file. It covers all of a tar. For a Zarr chunk it
    excludes the checksum at its end (with it, every sound chunk has the same CRC-32C)."""

    def __post_init__(self) -> None:
        require_inside(self.path)
        require_digest(self.sha256)
        require_entry(self.bytes >= 0, f"{self.path} has {self.bytes} bytes")
