"""Digest of all that determines a listing, computed without listing anything.

It covers the options, the places of the files, and times of change where they cost little. It may miss a change, such
as an image that is overwritten; store.relist=true then compares the data themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from permafrost.config.options import Role, options_of, resolve_implementation
from permafrost.core.files import sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from permafrost.config.file_data import DataConfig
    from permafrost.config.store import StoreOptions

_REVISION = 1
"""Revision of this digest and of the planning, incremented whenever finished stores must be compared again."""


@runtime_checkable
class StampedSource(Protocol):
    """Source that knows where common changes of its files show."""

    def stamps(self) -> Mapping[str, Any]:
        """Return JSON values that change with the files, such as times of change, without listing the records."""


def digest_origin(data: DataConfig, store: StoreOptions) -> str:
    """Return the SHA-256 of what determines the records, the plan and the form of a store."""
    source = resolve_implementation(type(data))(data)
    values = {option.name: getattr(data, option.name) for option in options_of(type(data))}
    stamps: dict[str, Any] = {}
    for option in options_of(type(data)):
        value = values[option.name]
        if Role.FILE in option.roles and value and "://" not in value:
            path = Path(value).absolute()
            values[option.name] = str(path)
            stamps[option.name] = _stamp(path)
    return sha256_json(
        {
            "digest_revision": _REVISION,
            "data": values,
            "files": stamps,
            "source_revision": source.revision,
            "source_stamps": source.stamps() if isinstance(source, StampedSource) else {},
            "store": [store.shard_size, store.seed, store.format, store.image_size],
        }
    )


def _stamp(path: Path) -> list[int] | None:
    """Return the bytes of a file and when it was changed, or when a folder got or lost an entry."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
