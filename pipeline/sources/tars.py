"""External tars: their paths, and the positions of the members of their samples."""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braceexpand import braceexpand

from pipeline.core.errors import ConfigError, UserError
from pipeline.store.pixels import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth", "pt")
"""Suffixes that the `.decode()` of a standard reader would unpickle, and pickle runs any code in the file."""

_NUMBERED = re.compile(r"^(?P<split>.+?)[-_.]?\d+$")


@dataclass(frozen=True)
class Member:
    """Position of one file of a sample in its tar."""

    offset: int
    size: int


def find_tars(path: Path) -> list[Path]:
    """Find the tars of a folder, of a glob or of a {000000..000009} range."""
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
            f"data.path={path} names no .tar; set it to a folder, a glob or a {{000000..000009}} range{packed}"
        )
    return found


def expand_range(text: str) -> list[str]:
    """Expand braces in a name as webdataset does: {000000..000009}, {a,b}.

    For a path whose folder exists, only the last part is expanded. Unmatched braces are part of a name.
    """
    folder, slash, name = text.rpartition("/")
    if not (slash and "://" not in text and Path(folder).is_dir()):
        folder, slash, name = "", "", text
    try:
        return [folder + slash + each for each in braceexpand(name, escape=False)]
    except ValueError:
        return [text]


def split_of_tar(name: str) -> str:
    """Return the part before the number in a tar's name, or `train` if it is empty."""
    stem = re.sub(r"-of-\d+$", "", Path(name).stem)
    match = None if stem.isdecimal() else _NUMBERED.match(stem)
    return match["split"] if match else "train"


def list_samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, {suffix: Member}) of every sample of a tar, as webdataset groups consecutive members."""
    from webdataset.tariterators import group_by_keys  # imports torch

    try:
        for sample in group_by_keys(_list_members(path)):
            members = {name: value for name, value in sample.items() if name[:2] != "__"}
            yield sample["__key__"], members
    except UserError:
        raise
    except (tarfile.TarError, OSError, OverflowError) as error:
        raise ConfigError(f"{path} cannot be read as an uncompressed tar: {error}") from error
    except ValueError as error:
        name, _, rest = str(error.args[0]).partition(": duplicate file name")
        if rest:
            raise ConfigError(f"{path} contains {name} twice; keep one of them") from error
        raise ConfigError(f"{path} cannot be read as an uncompressed tar: {error}") from error


def _list_members(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar in the form of webdataset's functions, with positions in place of data."""
    from webdataset.tariterators import base_plus_ext  # imports torch

    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, suffix = base_plus_ext(member.name)
            # A hidden file, such as macOS's ._image.jpg, is not part of a sample. webdataset reserves __names.
            is_hidden = Path(member.name).name.startswith(".")
            if not member.isfile() or is_hidden or not key or not suffix or suffix[:2] == "__":
                continue
            if member.name.rsplit(".", 1)[-1].lower() in PICKLED_SUFFIXES:
                raise ConfigError(
                    f"{path} contains {member.name}, which only pickle can read, and pickle runs code; "
                    "write such members as npy, json or safetensors"
                )
            place = Member(member.offset_data, member.size)
            yield {"fname": member.name, "data": place, "__url__": str(path)}
        _check_end(path, tar.offset)


def _check_end(path: Path, offset: int) -> None:
    """Raise ConfigError unless only zeros follow; tarfile treats any unreadable header as the end."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(tarfile.RECORDSIZE)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise ConfigError(
            f"{path} has no end mark at byte {offset}, where its last readable member ends: it was "
            "truncated, damaged, or concatenated from several tars; download or write it again"
        )


def _has_packed_tars(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.tar.*"))


def read_member(descriptor: int, member: Member, where: str) -> bytes:
    """Read the bytes of a member of an open tar; `where` is for the message."""
    size = os.fstat(descriptor).st_size
    if member.offset + member.size > size:
        raise ImageError(f"{where} ends before byte {member.offset + member.size}")
    data = os.pread(descriptor, member.size, member.offset)
    if len(data) != member.size:
        raise ImageError(f"{where} ends before byte {member.offset + member.size}")
    return data
