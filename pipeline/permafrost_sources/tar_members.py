"""External tars: their paths, and the positions of the members of their samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permafrost.core.errors import ConfigError, UserError, require
from permafrost.sources.several_files import expand_range
from permafrost.sources.tally import Tally
from permafrost.storage.files import file_at, is_stray, read_at
from permafrost.storage.rooted_paths import AnyPath, RootedPath, rooted
from permafrost.store.image_decoding import MAX_IMAGE_BYTES, ImageError

PICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth", "pt")
"""Suffixes that the `.decode()` of a standard reader would unpickle, and pickle runs any code in the file."""

PASSED_OVER_MEMBERS = "members of tars that belong to no sample"
"""Topic of a tally, by the reason."""
LINK_MEMBER = "link to another member"
"""A reason: the member is a link."""
UNNAMED_MEMBER = "name without a suffix"
"""A reason: its name does not say what it is."""
_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class Member:
    """Position of one file of a sample in its tar."""

    offset: int
    size: int


def find_tars_in_bucket(address: str) -> list[RootedPath]:
    """Find the tars of a bucket's folder, of a glob of names in one, or of a {000000..000009} range.

    Raises:
        ConfigError: If there are none.
    """
    tars: list[RootedPath] = []
    for each in expand_range(address):
        folder, _, name = each.rstrip("/").rpartition("/")
        if "*" in name or "?" in name:
            matches = file_at(rooted(folder)).paths(name)
        elif name.endswith(".tar"):
            matches = [path for path in (rooted(folder) / name,) if file_at(path).is_file()]
        else:
            matches = [
                path for path in file_at(rooted(each)).paths("*.tar") if not is_stray(path.name)
            ]
        require(
            len(matches) > 0,
            f"data.path={address} names no .tar ({each}); set it to a folder, a glob or a {{000000..000009}} range "
            "of a bucket",
        )
        tars += matches
    return tars


def list_samples(
    path: AnyPath, tally: Tally | None = None
) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, {suffix: Member}) of every sample of a tar, as webdataset groups consecutive members.

    Args:
        path: The tar.
        tally: Counts of the members that webdataset passes over, to which those met here are added; None counts none.

    Raises:
        ConfigError: If the tar cannot be read, is compressed or sparse, or has a member twice or one of pickle.
    """
    from webdataset.tariterators import group_by_keys  # imports torch

    try:
        for sample in group_by_keys(_list_members(path, tally)):
            members = {name: value for name, value in sample.items() if name[:2] != "__"}
            yield sample["__key__"], members
    except UserError:
        raise
    except ValueError as error:
        name, _, rest = str(error.args[0]).partition(": duplicate file name")
        if rest:
            raise ConfigError(f"{path} contains {name} twice; keep one of them") from error
        raise ConfigError(f"{path} cannot be read as an uncompressed tar: {error}") from error


def has_scattered_samples(path: AnyPath) -> bool:
    """Return whether members of a sample come again after those of another one, as in a tar that is not sorted.

    Raises:
        ConfigError: If the tar cannot be read.
    """
    last, ended = "", set[str]()
    for member in _list_members(path):
        folder, _, name = member["fname"].rpartition("/")
        key = f"{folder}/{name.split('.', 1)[0]}"
        if key != last:
            if key in ended:
                return True
            ended.add(last)
            last = key
    return False


def _list_members(path: AnyPath, tally: Tally | None = None) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar in the form of webdataset's functions, with positions in place of data."""
    from webdataset.tariterators import base_plus_ext  # imports torch

    with _opened_tar(path) as tar:
        for member in tar:
            require(
                not member.issparse(),
                f"{path} stores {member.name} with holes (GNU sparse), so its bytes are not in one piece; write "
                "the tar without --sparse",
            )
            key, suffix = base_plus_ext(member.name)
            if (reason := _reason_to_pass_over(member, key, suffix)) is not None:
                if tally is not None and not member.isdir():
                    tally.add(PASSED_OVER_MEMBERS, reason, member.name)
                continue
            require(
                member.name.rsplit(".", 1)[-1].lower() not in PICKLED_SUFFIXES,
                f"{path} contains {member.name}, which only pickle can read, and pickle runs code; "
                "write such members as npy, json or safetensors",
            )
            place = Member(member.offset_data, member.size)
            yield {"fname": member.name, "data": place, "__url__": str(path)}
        _check_end(path, tar.offset)


def _reason_to_pass_over(
    member: tarfile.TarInfo, key: str | None, suffix: str | None
) -> str | None:
    """Return why a member belongs to no sample, None for one that does."""
    if not member.isfile():
        return LINK_MEMBER if member.islnk() or member.issym() else "no regular file"
    if Path(member.name).name.startswith("."):  # such as macOS's ._image.jpg
        return "hidden"
    if not key or not suffix:
        return UNNAMED_MEMBER
    return "reserved by webdataset" if suffix[:2] == "__" else None


@contextmanager
def _opened_tar(path: AnyPath) -> Iterator[tarfile.TarFile]:
    """Provide a tar whose members are listed in the block. Raises ConfigError if it cannot be read."""
    try:
        with file_at(path).open() as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            yield tar
    except UserError:
        raise
    except (tarfile.TarError, OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as an uncompressed tar: {error}") from error


class _Headers(io.RawIOBase):
    """Tar whose members are listed and not read: headers are small, also those that a long name or PAX adds."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        require(
            0 <= size <= _MAX_HEADER_BYTES,
            f"a header has {size:,} bytes, more than {_MAX_HEADER_BYTES:,}",
            tarfile.ReadError,
        )
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check_end(path: AnyPath, offset: int) -> None:
    """Raise ConfigError unless only zeros follow; tarfile treats any unreadable header as the end."""
    with file_at(path).open() as file:
        rest = read_at(file, tarfile.RECORDSIZE, offset)
    require(
        len(rest) >= tarfile.BLOCKSIZE and not any(rest),
        f"{path} has no end mark at byte {offset}, where its last readable member ends: it was "
        "truncated, damaged, or concatenated from several tars; download or write it again",
    )


def read_member(file: io.FileIO, member: Member, where: str, most: int = MAX_IMAGE_BYTES) -> bytes:
    """Read the bytes of a member of an open tar.

    Args:
        file: The open tar.
        member: Position of the member.
        where: The member, for messages.
        most: Largest number of bytes; a larger member is not read.

    Raises:
        ImageError: If the member is larger, or the tar ends before it.
    """
    require(
        member.size <= most,
        f"{where} has {member.size:,} bytes, more than the {most:,} that it can have",
        ImageError,
    )
    data = read_at(file, member.size, member.offset)
    if len(data) != member.size:
        raise ImageError(f"{where} ends before byte {member.offset + member.size}")
    return data
