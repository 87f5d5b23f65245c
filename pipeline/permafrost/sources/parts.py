"""Parts of a source, such as tars, that separate processes can list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.core.records import Record

BYTES_PER_RECORD = 100_000
"""Assumed size of a record, which decides whether listing is worth starting Ray: that of a photograph."""


@runtime_checkable
class PartedSource(Protocol):
    """Source whose parts are listed separately, in any process."""

    unique_keys_option: str
    """Option that makes equal keys in several parts different, for a message."""

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part by its name, in the order of the listing."""

    def part_records(self, part: str) -> Iterator[Record]:
        """Yield the records of one part."""

    def classes_up_to(self, largest_label: int) -> tuple[str, ...]:
        """Return the class names of records with labels up to this one."""
