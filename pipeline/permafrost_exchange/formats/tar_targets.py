"""Base of readers of tars whose samples are the targets of a record each, as WebDataset groups members."""

from __future__ import annotations

import io
import json
from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from permafrost.core.errors import UserError
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath
from permafrost_exchange.target_reader import (
    Arrays,
    ListedTargets,
    ReadRequest,
    TargetError,
    TargetReader,
    parts_of,
    reading,
    stack_records,
    walk,
)
from permafrost_sources.tar_members import Member, list_samples, read_member

_MAX_MEMBER_BYTES = 2**27
_OPEN_TARS = 32


class TarReader(TargetReader):
    """Targets that are members of tars. A place is the tar, and the position of each member."""

    members: ClassVar[tuple[str, ...]]
    """Last parts of the suffixes of the members that are read; a sample has some of them."""

    def files(self) -> Iterator[Path]:
        return walk(self.path, ".tar")

    def listing(self) -> Iterator[ListedTargets]:
        for part in parts_of(self._listed()):
            names, places = zip(*part, strict=True)
            yield ListedTargets(names, places)

    def _listed(self) -> Iterator[tuple[str, str]]:
        """Yield the name and the place of each target."""
        endings = tuple(f".{member}" for member in self.members)
        for path in self.files():
            tar = path.relative_to(self.path).as_posix()
            for key, members in iter_samples(path):
                chosen = {
                    suffix: member
                    for suffix, member in members.items()
                    if f".{suffix}".endswith(endings)
                }
                if chosen:
                    places = [
                        [suffix, member.offset, member.size] for suffix, member in chosen.items()
                    ]
                    yield self.name_of(path, key, chosen), json.dumps([tar, *places])

    def name_of(self, path: Path, key: str, members: dict[str, Member]) -> str:
        """Return the name of a sample, by which it is joined.

        Args:
            path: The tar.
            key: Key of the sample.
            members: Its members by suffix.
        """
        return key

    def read(self, request: ReadRequest) -> Arrays:
        records = [self._parse_at(request, row) for row in range(len(request.names))]
        return stack_records(records, request.names[0], self.path)

    def _parse_at(self, request: ReadRequest, row: int) -> Arrays:
        tar, *found = json.loads(request.places[row])
        path, name = self.path / tar, request.names[row]
        members = {
            suffix: member_bytes(path, Member(*place), f"{name}.{suffix}")
            for suffix, *place in found
        }
        with reading(f"{path}: {name}"):
            return self.parse(members, request, row, f"{path}: {name}")

    @abstractmethod
    def parse(
        self, members: dict[str, bytes], request: ReadRequest, row: int, where: str
    ) -> Arrays:
        """Return the targets of a sample, [V, ...] each.

        Args:
            members: Bytes of its members by suffix.
            request: The request.
            row: Place of the record in the request.
            where: Tar and name, for messages.

        Raises:
            ValueError: If they are not such targets. The message describes the problem, without the file name.
        """


def iter_samples(path: AnyPath) -> Iterator[tuple[str, dict[str, Member]]]:
    """Iterate over the samples of a tar. Raises TargetError if it cannot be read."""
    try:
        yield from list_samples(path)
    except UserError as error:
        raise TargetError(str(error)) from error


@lru_cache(maxsize=_OPEN_TARS)
def _opened(path: AnyPath, size: int, changed: int | str) -> io.FileIO:
    return file_at(path).open()


def member_bytes(path: AnyPath, member: Member, name: str) -> bytes:
    """Return the bytes of a member, of limited size.

    Args:
        path: The tar.
        member: Position of the member.
        name: Name of the member, for messages.

    Raises:
        TargetError: If it is larger, or the tar ends before it.
    """
    file = _opened(path, *file_at(path).stamp())
    try:
        return read_member(file, member, f"{path}: {name}", _MAX_MEMBER_BYTES)
    except UserError as error:
        raise TargetError(str(error)) from error
