"""Names of classes: read from a file, gathered from folders or cells, and looked up.

All sources share these rules, so that the same labels as folders, in a table or in tars are the same classes.

- Names that differ only in surrounding blanks, or in how Unicode composes a letter (NFC and NFD), are one name.
- Whole numbers sort by value, all other names by their text.
- In a table and in a tar, classes that are all whole numbers are the labels themselves: 0 to the largest. Numbers with
  leading zeros are names.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from permafrost.core.errors import ConfigError, quote, require
from permafrost.storage.files import iter_lines
from permafrost.storage.rooted_paths import user_path

MAX_CLASSES = 1_000_000
"""Limit for labels that are numbers. A larger label is a mistake, and would require a list of that many class
names."""

_UNKNOWN = frozenset(
    {
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A"),
        *("NA", "NULL", "None", "n/a", "null"),
    }
)
"""Words for an unknown label, those of pandas.read_csv; NaN in any letter case is another one."""


_INDEXED = re.compile(r"(\d+)\s*[,:;\s]\s*\S.*|\S.*[,;\t]\s*(\d+)")
"""Line of a list of classes that has an index before the name, or after it."""


def is_nan(text: str) -> bool:
    """Return whether a cell is NaN as text, in any case of its letters."""
    return re.fullmatch("[-+]?nan", text, re.IGNORECASE) is not None


def is_unknown(text: str) -> bool:
    """Return whether a label, without surrounding blanks, means that it is unknown."""
    return text in _UNKNOWN or is_nan(text)


def to_number(text: str) -> int | None:
    """Parse a whole number of at most 18 digits, written 3 or 3.0; None for other text."""
    match = re.fullmatch(r"([+-]?[0-9]{1,18})(\.0*)?", text)
    return int(match[1]) if match else None


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct names, numerically if all are whole numbers, else alphabetically."""
    distinct = sorted(set(names))
    numbers = [to_number(name) for name in distinct]
    if all(number is not None for number in numbers):
        return tuple(sorted(distinct, key=lambda name: to_number(name) or 0))
    return tuple(distinct)


def composed(name: str) -> str:
    """Return a name without surrounding blanks, with composed letters (NFC): the form for comparing names."""
    return unicodedata.normalize("NFC", name.strip())


def merge_spellings(names: Iterable[str]) -> dict[str, str]:
    """Map each name to its class. A class that is spelled in one way keeps that spelling, without blanks."""
    spellings: dict[str, set[str]] = {}
    for name in names:
        spellings.setdefault(composed(name), set()).add(name)
    return {
        name: next(iter(group)).strip() if len(group) == 1 else form
        for form, group in spellings.items()
        for name in group
    }


@dataclass(frozen=True)
class ClassIndex:
    """Class names in label order, and the way the data refer to them."""

    names: tuple[str, ...]
    is_numbered: bool
    """True if the data contain labels instead of names."""

    @cached_property
    def _label_of(self) -> dict[str, int]:
        forms = {composed(name): label for label, name in enumerate(self.names)}
        return forms | {name: label for label, name in enumerate(self.names)}

    def label(self, text: str) -> int | None:
        """Return the label that a text denotes, or None if there is no such class."""
        if not self.is_numbered:
            label = self._label_of.get(text)
            return label if label is not None else self._label_of.get(composed(text))
        number = to_number(text)
        return number if number is not None and 0 <= number < len(self.names) else None

    def line_of(self, text: str) -> str | None:
        """Return the name whose first word is a text, as in lists of folders and their meanings."""
        return next((name for name in self.names if re.split(r"[\s,:;]", name)[0] == text), None)


def index_classes(texts: set[str], classes: str | None, *, numbered: bool = True) -> ClassIndex:
    """Build the index of the classes that these texts name.

    Args:
        texts: Distinct texts of folders or cells.
        classes: Option data.classes; None takes the classes from the texts.
        numbered: Whether whole numbers may be labels, as in a table; False takes them as names.

    Raises:
        ConfigError: If the file of data.classes cannot be used.
    """
    numbers = [to_number(text) for text in texts]
    are_labels = numbered and all(
        number is not None and not has_leading_zero(text)
        for text, number in zip(texts, numbers, strict=True)
    )
    if classes is not None:
        names = load_class_names(classes)
        forms = {composed(name) for name in names}
        are_labels = are_labels and not {composed(text) for text in texts} <= forms
        known = [number for number in numbers if number is not None]
        require(
            not are_labels or min(known) < 1 or max(known) != len(names),
            f"data.classes={classes} has {len(names):,} names and labels are numbers from {min(known, default=0)} to "
            f"{len(names):,}, so they count from 1; labels count from 0: subtract one from each, or write the names",
        )
        return ClassIndex(names, are_labels)
    if are_labels:
        largest = max((number for number in numbers if number is not None), default=-1)
        return ClassIndex(tuple(map(str, range(largest + 1))), True)
    return ClassIndex(sorted_names(merge_spellings(texts).values()), False)


def load_class_list(path: str | None) -> frozenset[str]:
    """Return the names of data.classes, composed; empty without that option.

    Raises:
        ConfigError: If the file cannot be used.
    """
    return frozenset(() if path is None else map(composed, load_class_names(path)))


def has_leading_zero(text: str) -> bool:
    """Return whether a whole number has zeros before its first digit, as identifiers have: 007."""
    return re.match(r"[+-]?0[0-9]", text) is not None


def load_class_names(path: str) -> tuple[str, ...]:
    """Read the lines of `data.classes`, in label order, without empty lines and a byte-order mark.

    Raises:
        ConfigError: If the file cannot be read, is empty or in another format, or lists a class twice.
    """
    try:
        lines = list(iter_lines(user_path(path), f"data.classes={path}"))
    except OSError as error:
        raise ConfigError(f"data.classes={path} cannot be read: {error}") from error
    require(
        re.fullmatch(r'\s*[\[{]\s*(["\d].*)?[\]}]\s*', "\n".join(lines), re.DOTALL) is None,
        f"data.classes={path} is JSON; write one class name per line",
    )
    names = tuple(line.strip() for line in lines if line.strip())
    require(len(names) > 0, f"data.classes={path} is empty; write one class name per line")
    indices = [int(match[1] or match[2]) for name in names if (match := _INDEXED.fullmatch(name))]
    counted = [list(range(first, first + len(names))) for first in (0, 1)]
    require(
        len(names) == 1 or sorted(indices) not in counted,
        f"data.classes={path} has a number next to each name, such as {quote(names[0])}; write the names alone, in "
        "the order of their numbers",
    )
    require(
        not (len(names) > 1 and all(name.startswith("- ") for name in names))
        and not any(re.fullmatch(r"names\s*:.*", name) for name in names),
        f"data.classes={path} is YAML; write one class name per line",
    )
    name, times = Counter(map(composed, names)).most_common(1)[0]
    require(
        times == 1,
        f"data.classes={path} lists the class {quote(name)} {times} times; keep one of them",
    )
    return names


_MIRRORED = (
    *(("left", "right"), ("link", "recht"), ("gauche", "droite"), ("izquierd", "derech")),
    *(("esquerd", "direit"), ("sinistr", "destr"), ("左", "右"), ("east", "west")),
    *(("counterclockwise", "clockwise"), ("anticlockwise", "clockwise")),
    *((" l ", " r "), (" b ", " d "), (" p ", " q ")),
)
"""Parts of names that a mirror exchanges, of which letters stand alone."""


def find_mirrored(classes: Iterable[str]) -> tuple[str, ...]:
    """Return two classes whose names differ by left and right, or by letters that mirror each other, or nothing."""
    named = {re.sub(r"[\W_]+", " ", f" {name} ").casefold(): name for name in classes}
    for name in named:
        for one, other in _MIRRORED:
            twin = name.replace(one, "\0").replace(other, one).replace("\0", other)
            if twin != name and twin in named:
                return named[name], named[twin]
    return ()
