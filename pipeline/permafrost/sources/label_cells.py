"""Cells of a table that hold several labels: lists, and names between separators."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from typing import Any

from permafrost.core.errors import quote, require
from permafrost.sources.classes import composed, is_unknown, to_number

SEPARATORS = ("|", ";", ",", "/", "+", "&", " ")
"""Separators that are recognized; a blank stands for any white space."""
LABEL_LISTS = "lists of labels"
"""Topic of a tally: lists that have a 0 or a 1 for each class, and all others."""
UNLABELED_CELLS = "label cells without a class"
"""Topic of a tally: -1, and empty cells."""
_SHARE = 0.5
"""Least fraction of the pieces that must occur in another cell."""
_MAX_LIST_CHARACTERS = 100_000
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


def separate(text: str, separator: str) -> list[str]:
    """Return the pieces of a cell without surrounding blanks; an empty separator leaves it whole."""
    if not separator:
        return [text]
    pieces = text.split() if separator == " " else text.split(separator)
    return [piece.strip() for piece in pieces if piece.strip()]


def find_separator(cells: Set[str], names: Set[str] = frozenset()) -> str:
    """Find the separator whose pieces recombine: most of them also occur in other cells, or are names of classes.

    Args:
        cells: Distinct cells of the column, all text.
        names: Known class names, composed (classes.composed).

    Returns:
        The first of SEPARATORS that fits, empty if none does.
    """
    return next(
        (separator for separator in SEPARATORS if _pieces_recombine(cells, names, separator)), ""
    )


def _pieces_recombine(cells: Iterable[str], names: Set[str], separator: str) -> bool:
    cells_of = Counter[str]()
    cut = set[str]()
    for cell in cells:
        pieces = set(separate(cell, separator))
        cells_of.update(pieces)
        if len(pieces) > 1 and composed(cell) not in names:
            cut |= pieces
    shared = sum(cells_of[piece] > 1 or composed(piece) in names for piece in cut)
    return bool(cut) and shared >= _SHARE * len(cut)


def is_list_text(text: str) -> bool:
    """Return whether a cell looks like a list that was written as text: ["cat", "dog"], ['cat'], ('cat', 'dog')."""
    return len(text) > 1 and (text[0], text[-1]) in (("[", "]"), ("(", ")"), ("{", "}"))


def state_of(value: Any) -> bool | None:
    """Return whether a cell of one class says that a record has it: 1 or 0, true or false, yes or no.

    Args:
        value: Cell of any type.

    Returns:
        The answer, None where it is unknown: an empty cell, a word for an unknown label, or -1.

    Raises:
        ValueError: If the cell says something else.
    """
    text = "" if value is None else str(value).strip()
    number = to_number(text)
    if is_unknown(text) or number == -1:
        return None
    for words, state in ((("true", "yes", "y"), True), (("false", "no", "n"), False)):
        if text.lower() in words or number == state:
            return state
    raise ValueError(
        f"{quote(text)} is not 1 or 0 (or true or false, yes or no); a cell without anything, or -1, is unknown"
    )


def are_states(values: Any, num_classes: int) -> bool:
    """Return whether a list has 1, 0 or nothing for each class, and cannot be one of the numbers of classes."""
    if not isinstance(values, list) or len(values) != num_classes or num_classes < 2:
        return False
    try:
        states = [state_of(value) for value in values]
    except ValueError:
        return False
    return None in states or len(set(states)) < len(states)


def is_one_hot(values: Sequence[Any]) -> bool:
    """Return whether a list has a 0 or a 1 for each class, and no class numbers."""
    return len(values) > 1 and all(
        isinstance(value, (int, float)) and value in (0, 1) for value in values
    )


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of a JSON text's pairs (object_pairs_hook); raise ValueError if a name occurs twice."""
    values = dict(pairs)
    require(len(values) == len(pairs), f"{quote(list(values))} are in it twice", ValueError)
    return values


def parse_list(text: str) -> list[Any]:
    """Parse a list of names or numbers, in JSON or as Python writes it.

    Raises:
        ValueError: If it is any other text.
    """
    require(len(text) <= _MAX_LIST_CHARACTERS, f"it has {len(text):,} characters", ValueError)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError("it is not a JSON or Python list") from error
    values = sorted(values, key=str) if isinstance(values, set) else values
    if not isinstance(values, (list, tuple)) or not all(
        value is None or isinstance(value, (str, int, float)) for value in values
    ):
        raise ValueError("it is not a list of names or numbers")
    # Python joins texts without a comma between them, as in NumPy's ['cat' 'dog'].
    if len(_QUOTED.findall(text)) > len(values):
        raise ValueError("its names have no commas between them")
    return list(values)
