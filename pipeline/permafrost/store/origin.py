"""Origin of a finished store's records: a digest of all that determined them, next to the manifest.

With the same digest and every file in place, a repeated command need not list the data. The file is no part of the
store: without it, the data are listed and compared.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from permafrost.core.files import (
    FileError,
    LinkError,
    canonical_json,
    read_regular,
    write_atomically,
)
from permafrost.store.publish import is_whole, needs_publishing, published_store

if TYPE_CHECKING:
    from permafrost.core.files import RootedPath
    from permafrost.store.manifest import StoreManifest

ORIGIN_NAME = ".origin.json"
_MOST_BYTES = 4096


def write_origin(store: RootedPath, digest: str, fingerprint: str) -> None:
    """Write the origin of a finished store, unless it is there or the folder is read-only.

    digest       of the options and files of the data, from permafrost/sources/origin.py
    fingerprint  of the dataset
    """
    text = _text(digest, fingerprint)
    if _read(store) != text:
        with suppress(FileError):
            write_atomically(store / ORIGIN_NAME, text)


def find_finished(store: RootedPath, digest: str) -> StoreManifest | None:
    """Return the manifest of a store of that origin if every shard has its file and its receipt, else None."""
    if needs_publishing(store):
        return None
    manifest = published_store(store)
    if manifest is None or _read(store) != _text(digest, manifest.dataset.fingerprint):
        return None
    return manifest if all(is_whole(store, shard) for shard in manifest.shards) else None


def _text(digest: str, fingerprint: str) -> bytes:
    return canonical_json({"dataset_fingerprint": fingerprint, "origin_sha256": digest}) + b"\n"


def _read(store: RootedPath) -> bytes | None:
    try:
        return read_regular(store / ORIGIN_NAME, _MOST_BYTES)
    except LinkError:
        raise
    except (FileError, FileNotFoundError):
        return None
