"""What an evaluator consists of: how it runs, what it checks before, and how the report shows its quantities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.evaluation.metrics import PLAIN, Metric

if TYPE_CHECKING:
    from pipeline.evaluation.context import EvaluationContext


class Quantity(NamedTuple):
    """A quantity of an evaluator, how its numbers are read, and the table that the report makes of it."""

    name: str
    """<quantity>, or <quantity>.<part>; a number, or numbers by name below it."""
    caption: str
    metric: Metric = PLAIN
    plot: str = ""
    """line: its numbers over their names, a curve an arm; bar: side by side; empty: none."""
    is_main: bool = True
    """Whether the table is shown at once; the others unfold."""


class Page(NamedTuple):
    """The report's section of an evaluator."""

    short: str
    title: str
    introduction: str
    quantities: tuple[Quantity, ...]
    per_split: bool = True
    """False of an evaluator whose numbers are the same for every split."""


def needs_nothing_else(context: EvaluationContext) -> Mapping[str, str]:
    """The check of an evaluator that has everything it needs."""
    return {}


class Evaluator(NamedTuple):
    """A member of the family."""

    run: Callable[[EvaluationContext], Mapping[str, Any]]
    """The numbers of one split, JSON; what is large goes to files in context.folder."""
    check: Callable[[EvaluationContext], Mapping[str, str]] = needs_nothing_else
    """Before anything is computed: ConfigError, saying what it needs and how to give it, where that is not there;
    path -> sha256 of the files that it reads beside the model, the store and the passes (another student)."""
    page: Page | None = None
    """None where the report shows its numbers elsewhere."""
