"""Entries of a manifest for single files, the checks that every entry passes, and the errors of a damaged store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from permafrost.core.errors import UserError
from permafrost.store.entries import EntryError

REPAIR = "run permafrost precompute again, which writes missing files"
"""Advice for a missing file of the store."""
REWRITE = "delete it and run permafrost precompute again, which writes missing files"
"""Advice for a damaged file of the store."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Pattern of the names of shards and fields."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ManifestError(UserError, ValueError):
    """Store, or a part of it, that is damaged, incomplete or of another version."""


class StoreMismatchError(UserError, ValueError):
    """Store that is intact but does not match the config."""


def require_entry(condition: bool, error_message: str) -> None:
    """Raise EntryError unless the condition holds."""
    if not condition:
        raise EntryError(error_message)


def require_inside(path: str) -> None:
    """Raise EntryError unless a path stays in the folder that it is relative to."""
    pure = PurePosixPath(path)
    require_entry(
        bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path,
        f"the path {path!r} leaves the folder",
    )


def require_digest(digest: str) -> None:
    """Raise EntryError unless the text is a SHA-256."""
    require_entry(_DIGEST.fullmatch(digest) is not None, f"{digest[:80]!r} is not a SHA-256")


def require_shard_name(name: str) -> None:
    """Raise EntryError unless files may be named after the shard."""
    require_entry(NAME.fullmatch(name) is not None, f"{name[:80]!r} is not a shard name")


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
