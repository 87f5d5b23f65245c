"""Somebody else's tars: which there are, and where the members of their samples lie."""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError, UserError
from pipeline.store.pixels import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth", "pt")
"""What a stock reader's `.decode()` would hand to pickle, and so to whatever code the file holds."""

_MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_NUMBERED = re.compile(r"^(?P<split>.+?)[-_.]?\d+$")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """Where one file of a sample lies in its tar."""

    offset: int
    size: int


def find_tars(path: Path) -> list[Path]:
    """Tars of a folder, or those that a glob or a {000000..000009} range names."""
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        names = [Path(name) for name in expand_range(str(path))]
        matches = {name: sorted(name.parent.glob(name.name)) for name in names}
        found = [match for name in names for match in matches[name]]
        missing = [name for name in names if not matches[name]]
        if found and missing:
            raise ConfigError(f"data.path={path} names {missing[0]}, which does not exist")
    if not found:
        packed = "; unpack .tar.gz and .tar.zst first" if _has_packed_tars(path) else ""
        raise ConfigError(
            f"data.path={path} names no .tar; give a folder, a glob or a {{000000..000009}} range{packed}"
        )
    return found


def expand_range(text: str) -> list[str]:
    """The names that a {first..last} range stands for; its zeros are kept."""
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last = match.groups()
    return [
        text[: match.start()] + f"{number:0{len(first)}d}" + text[match.end() :]
        for number in range(int(first), int(last) + 1)
    ]


def split_of(name: str) -> str:
    """What stands before the number in a tar's name; `train` where nothing does."""
    stem = re.sub(r"-of-\d+$", "", Path(name).stem)
    match = None if stem.isdecimal() else _NUMBERED.match(stem)
    return match["split"] if match else "train"


def list_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {suffix: Member}) of every sample of a tar: consecutive members up to the first dot."""
    current, members = None, dict[str, Member]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                match = _MEMBER.match(member.name) if member.isfile() else None
                if match is None:
                    continue
                key, suffix = match[1], match[2].lower()
                if suffix.rsplit(".", 1)[-1] in PICKLED_SUFFIXES:
                    raise ConfigError(
                        f"{path} holds {member.name}, which only pickle reads, and pickle runs code; "
                        "write such members as npy, json or safetensors"
                    )
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                if suffix in members:
                    raise ConfigError(f"{path} holds {member.name} twice; keep one of them")
                members[suffix] = Member(member.offset_data, member.size)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, OverflowError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    if current is not None:
        yield current, members


def _check_end(path: Path, offset: int) -> None:
    """ConfigError unless only zeros follow; tarfile takes any header that it cannot read for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(tarfile.RECORDSIZE)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise ConfigError(
            f"{path} has no end mark at byte {offset}, where its last readable member ends: it was cut "
            "off, damaged, or put together from several; fetch or write it anew"
        )


def _has_packed_tars(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.tar.*"))


def read_member(descriptor: int, member: Member, where: str) -> bytes:
    """The bytes of a member of an open tar; `where` is for the message."""
    size = os.fstat(descriptor).st_size
    if member.offset + member.size > size:
        raise ImageError(f"{where} ends before byte {member.offset + member.size}")
    data = os.pread(descriptor, member.size, member.offset)
    if len(data) != member.size:
        raise ImageError(f"{where} ends before byte {member.offset + member.size}")
    return data
