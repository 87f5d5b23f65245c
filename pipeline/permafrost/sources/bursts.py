"""Bursts of photographs: pictures of one scene, which belong to one split.

Photographs of a class are of one burst if one camera took them within GAP seconds, by EXIF or else by the time in their
names. In a folder, names say it, too: `00001IMG_00001_BURST20190101120000`, `IMG_1 (1)` or `IMG_1-edited` next to
`IMG_1`, `IMG_E0001`, and a name with two suffixes. Consecutive numbers alone say nothing.
"""

from __future__ import annotations

import logging
import re
import struct
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from posixpath import splitext
from typing import TypeAlias
from urllib.parse import unquote

from PIL import ExifTags, Image

from permafrost.core.records import MAX_GROUP, NO_GROUP, Record
from permafrost.sources.classes import composed
from permafrost.sources.image_files import HEIF_SUFFIXES
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import AnyPath

logger = logging.getLogger("permafrost.sources")

GAP = 10
"""Most seconds between two photographs of a burst that follow one another."""
Photograph: TypeAlias = tuple[str, int, str, float]
"""Path, label, camera, and time in seconds, which is -inf if it is unknown."""
_HEAD_BYTES = 70_000
"""First bytes of a file with its EXIF data, which JPEG has in the first 64 kB. HEIC may have it at the end."""

_EXIF = re.compile(rb"(?:Exif\0\0|EXIF.{4}|eXIf)(?=II\*\0|MM\0\*)", re.DOTALL)
_TIME = re.compile(r"(.*?)(?<!\d)((?:19|20)\d{6}[-_](?!00)\d{6})(?:\d{3})?(?!\d)")
"""Time in a name, with milliseconds or not. After midnight, it would rather be a date and a running number."""
_COPY = re.compile(
    r"^(.*/)(?:.*(BURST\d{8,}).*|(.+[_-]BURST)\d{1,4}(?:[_-]COVER)?|(IMG_)E(\d+)|"
    r"(.+?)(?:(?<=\d) ?\(\d\)|~\d|[ _-]+\(?(?:copy|kopie|copie|copia|edit|edited|bearbeitet)\)?(?: ?\(?\d\d?\)?)?))$",
    re.IGNORECASE,
)


def photograph_of(record: Record, data: bytes) -> Photograph:
    """Read when a photograph was taken, and by which camera, from the bytes of its file and from its name."""
    path = composed(unquote(record.key))
    camera, moment = (_TIME.findall(path.rpartition("/")[2]) or [("", "")])[-1]
    errors = SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, OSError, struct.error
    with suppress(*errors), warnings.catch_warnings(action="ignore"):
        exif = Image.Exif()
        is_heif = data[4:8] == b"ftyp"
        exif.load(_EXIF.split(data if is_heif else data[:_HEAD_BYTES], 1)[1])
        camera = f"{exif.get(ExifTags.Base.Make)} {exif.get(ExifTags.Base.Model)}"
        moment = str(exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal, moment))
    digits, seconds = re.sub(r"\D|00:00:00$", "", moment), float("-inf")  # not a date alone
    with suppress(ValueError):
        seconds = datetime.strptime(f"{digits}+0000", "%Y%m%d%H%M%S%z").timestamp()
    return path, record.label, camera, seconds


def find_bursts(photographs: Sequence[Photograph]) -> list[int]:
    """Return for each photograph the row of its burst's first one."""
    stems = [f"/{splitext(path)[0]}" for path, *_ in photographs]
    rows = sorted(range(len(stems)), key=lambda row: len(stems[row]))  # copies after originals
    firsts, places = list(range(len(stems))), dict[str, int]()
    for one, other in pairwise(sorted(rows, key=lambda row: photographs[row][1:])):
        first, last = photographs[one], photographs[other]
        if first[1:3] == last[1:3] and last[3] - first[3] <= GAP:
            firsts[other] = firsts[one]
    for row in rows:
        origin = _COPY.sub(r"\1\2\3\4\5\6", stems[row])
        if origin in places or "BURST" in origin.upper():
            firsts[row] = firsts[places.setdefault(origin, row)]
        places.setdefault(stems[row], row)
    return firsts


def with_bursts(records: Iterable[Record], root: AnyPath) -> Iterator[Record]:
    """Yield records of photographs with their bursts as groups, once all are listed.

    A burst's number is below NO_GROUP and a hash of the key of its first photograph, so that it stays when others are
    added. Of files in buckets, names alone are read.

    Args:
        records: Records whose content is a path below the root and a size.
        root: Root of the data.
    """
    started, ordered = time.monotonic(), list(records)
    photographs = [
        photograph_of(
            record,
            file_at(root / path).peek(
                size if path.lower().endswith(HEIF_SUFFIXES) else _HEAD_BYTES
            ),
        )
        for record in ordered
        for path, size in [record.content]
    ]
    firsts = find_bursts(photographs)
    logger.info(
        "data.group=burst: read %d files in %.1f s, %d of them with the time of the photograph: %d groups",
        len(ordered),
        time.monotonic() - started,
        sum(moment > float("-inf") for *_, moment in photographs),
        len(set(firsts)),
    )
    yield from (
        replace(
            record, group=NO_GROUP - 1 - zlib.crc32(ordered[first].key.encode()) % (MAX_GROUP - 1)
        )
        for record, first in zip(ordered, firsts, strict=True)
    )
