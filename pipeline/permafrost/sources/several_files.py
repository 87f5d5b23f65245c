"""Files of a folder, a glob or a range that are read together, and the splits in their names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from braceexpand import braceexpand

from permafrost.core.errors import ConfigError
from permafrost.sources.splits import TRAIN, known_split
from permafrost.sources.tally import Tally
from permafrost.storage.files import is_stray

OTHER_FILES = "other files, not read"
"""Topic of a tally: files of other kinds in the folder of tars or tables, by suffix."""
OTHER_FOLDERS = "folders that are not read"
"""Topic of a tally: folders in it with further ones."""

READ_PARTS = "parts that are read"
"""Topic of a tally: files with numbered names."""
ABSENT_PARTS = "parts that are absent"
"""Topic of a tally: files that are absent between others, or that their names count, by the first name."""

_PARTS = (
    re.compile(
        r"(?P<start>.*?)(?P<number>\d+)(?P<rest>[-_. ]*of[-_. ]*(?P<count>\d{1,6}))(?!\d)", re.I
    ),
    re.compile(r"(?P<start>(.*[-_. ])?part[-_. ]?)(?P<number>\d+)(?P<rest>)(?!\d)", re.I),
    re.compile(r"(?P<start>.*?)(?P<number>\d+)(?P<rest>\D*)$"),
)
"""Names of parts: a number and a count (00000-of-00002), a number after the word (part-00003-<text>), the last one."""
_MAX_ABSENT = 10
"""Largest multiple of the parts of padded numbers (00000) that are there, of those that may be absent between them."""
_NUMBERED = re.compile(r"^(?P<split>.+?)[-_.]?\d+$")


def inner_folder(path: Path, suffix: str) -> Path:
    """Return the only folder with files of a suffix in a folder that has none itself, or the path as it is.

    Args:
        path: Folder, such as that of a set of Hugging Face, whose files are in `data`; glob, range or file.
        suffix: Suffix with its dot, such as .parquet.
    """
    if not path.is_dir() or any(path.glob(f"*{suffix}")):
        return path
    inner = {file.parent for file in path.glob(f"*/*{suffix}")}
    return inner.pop() if len(inner) == 1 else path


def find_files(path: Path, suffix: str) -> list[Path]:
    """Find the files of a folder with a suffix, or those of a glob or of a {000000..000009} range.

    Args:
        path: Folder, glob or range.
        suffix: Suffix with its dot, such as .tar.

    Raises:
        ConfigError: If there are none, if one of a range is missing, or if the folder also has compressed ones.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob(f"*{suffix}") if not is_stray(file.name))
        others = sorted(entry.name for entry in path.iterdir() if _is_packed(entry.name, suffix))
        if files and others:
            raise ConfigError(
                f"data.path={path} also contains {others[0]}, which is not read; unpack or rename it, or name the "
                f"files by a glob such as {path}/*{suffix}"
            )
    else:
        names = [Path(name) for name in expand_range(str(path))]
        matches = {
            name: sorted(
                file
                for file in name.parent.glob(name.name)
                if file == name or not is_stray(file.name)
            )
            for name in names
        }
        files = [match for name in names for match in matches[name]]
        missing = [name for name in names if not matches[name]]
        if files and missing:
            raise ConfigError(f"data.path={path} names {missing[0]}, which does not exist")
    if not files:
        packed = "; unpack .tar.gz and .tar.zst first" * any(path.glob("*.tar.*"))
        inner = sorted({file.parent.name for file in path.glob(f"*/*{suffix}")})
        if inner:
            folders = inner[0] if len(inner) == 1 else f"{{{','.join(inner)}}}"
            packed = f". There are some in its folders: data.path='{path}/{folders}/*{suffix}'"
        raise ConfigError(
            f"data.path={path} names no {suffix}; set it to a folder, a glob or a {{000000..000009}} range{packed}"
        )
    return files


def tally_other_files(path: Path, suffix: str, tally: Tally, expected: Container[str] = ()) -> None:
    """Count what a folder has besides the files of a suffix that are read: other files, and folders with more of them.

    Args:
        path: Folder; nothing is counted for a glob or a range, which name what they mean.
        suffix: Suffix with its dot, such as .tar.
        tally: Counts to add to.
        expected: Names of files that are read otherwise.
    """
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.is_dir():
            further = next(entry.glob(f"**/*{suffix}"), None)
            if further is not None:
                tally.add(OTHER_FOLDERS, entry.name, str(further.relative_to(path)))
        elif (entry.suffix != suffix or is_stray(entry.name)) and entry.name not in expected:
            item = "hidden" if is_stray(entry.name) else entry.suffix or "no suffix"
            tally.add(OTHER_FILES, item, entry.name)


def tally_absent_parts(names: Iterable[str], tally: Tally) -> None:
    """Count the files that are absent of sets whose names have a number, as in train-00000-of-00002 and train_3.tar.

    Args:
        names: Names of the files that are read.
        tally: Counts to add to.
    """
    names = list(names)
    tally.add(READ_PARTS, "", count=len(names))
    for item, absent in absent_parts(names):
        tally.add(ABSENT_PARTS, item, count=absent)


def absent_parts(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Iterate over the sets of names with a number of which some are absent.

    Without a count, as in 00000-of-00002, it is about the numbers between the first and the last, unless so many of
    them are absent that they are rather identifiers or years.

    Args:
        names: Names of files or folders.

    Yields:
        The first absent name, and how many are absent.
    """
    sets: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        match = next((match for part in _PARTS if (match := part.match(stem or suffix))), None)
        if match is not None:
            count = int(match.groupdict().get("count") or 0)
            numbers = sets.setdefault((match["start"], match["rest"], count), {})
            numbers[int(match["number"])] = match["number"]
    for (start, rest, count), numbers in sets.items():
        from_one = count in numbers
        first, last = (from_one, count - 1 + from_one) if count else (min(numbers), max(numbers))
        absent = last - first + 1 - len(numbers)
        width = min(map(len, numbers.values()))
        is_padded = any(text.startswith("0") for text in numbers.values()) and width > 1
        if absent > 0 and (count or absent < len(numbers) * (_MAX_ABSENT if is_padded else 1)):
            number = next(number for number in range(first, last + 1) if number not in numbers)
            yield f"{start}{number:0{width}}{rest}", absent


def _is_packed(name: str, suffix: str) -> bool:
    """Return whether a file is one of the wanted kind, but compressed or with another case of its suffix."""
    text = name.lower()
    packed = (f"{suffix}.gz", f"{suffix}.zst", f"{suffix}.bz2", f"{suffix}.xz", ".tgz")
    return text.endswith(packed) or (text.endswith(suffix) and not name.endswith(suffix))


def expand_range(text: str) -> list[str]:
    """Expand braces in a name as webdataset does: {000000..000009}, {a,b}.

    For a path whose folder exists, only the last part is expanded. Unmatched braces are part of a name.
    """
    folder, slash, name = text.rpartition("/")
    if not (slash and "://" not in text and Path(folder).is_dir()):
        folder, slash, name = "", "", text
    try:
        return [folder + slash + expanded for expanded in braceexpand(name, escape=False)]
    except ValueError:
        return [text]


def split_before_number(name: str) -> str:
    """Return the part of a tar's name before its number, empty if there is none."""
    stem = re.sub(r"-of-\d+$", "", Path(name).stem)
    match = None if stem.isdecimal() else _NUMBERED.match(stem)
    return match["split"] if match else ""


@lru_cache(maxsize=4096)
def split_in_name(stem: str) -> str:
    """Return the split in the name of one of several files, without its suffix.

    It is the part before the number, or its last word if that spells a split (imagenet1k-train-0000). Without a number
    it is the split that a word spells (test-a), and else `train`.
    """
    stem = re.sub(r"-of-\d+$", "", stem)
    match = None if stem.isdecimal() else _NUMBERED.match(stem)
    text = match["split"] if match else stem
    words = re.split(r"[-_.]", text)
    split = known_split(text) or known_split(words[-1])
    if match or split:
        return split or text
    splits = {each for word in words if (each := known_split(word)) is not None}
    return splits.pop() if len(splits) == 1 else TRAIN
