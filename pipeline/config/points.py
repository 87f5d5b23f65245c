"""The points of a grid of options: which there are, what they are called, which one is best."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


Point = dict[str, Any]
"""An option -> its value."""


def iter_points(grid: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Every combination, the last option's values fastest; one empty point where there is no option."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def knows_option(composed: Any, option: str) -> bool:
    """Whether a composed config has the option that a dotted name means."""
    node = composed
    for name in option.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def point_words(point: Point) -> list[str]:
    """The point as overrides."""
    return [f"{option}={_hydra_text(value)}" for option, value in point.items()]


def _hydra_text(value: Any) -> str:
    """As Hydra's grammar reads it: JSON, but for the quotes around keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_hydra_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_hydra_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def point_label(point: Point) -> str:
    """The point in a few words: options by their last name where that is no other's."""
    names = {option: option.rpartition(".")[2] for option in point}
    short = list(names.values())
    return " ".join(
        f"{names[option] if short.count(names[option]) == 1 else option}={value}"
        for option, value in point.items()
    )
