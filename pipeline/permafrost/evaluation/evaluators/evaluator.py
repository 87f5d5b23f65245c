"""The interface of an evaluator: how it runs, what it checks first, and how the report shows its quantities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from permafrost.evaluation.metrics import PLAIN, Metric

if TYPE_CHECKING:
    from permafrost.evaluation.context import EvaluationContext


class Quantity(NamedTuple):
    """A quantity of an evaluator: its metric and its table in the report."""

    name: str
    """Name <quantity> or <quantity>.<part> of a number, or of a mapping from names to numbers."""
    caption: str
    meaning: str
    """One sentence that says what the numbers are, for the report."""
    metric: Metric = PLAIN
    plot: str = ""
    """Kind of plot: "line" (one curve per arm over the names of the numbers), "bar" (arms side by side) or none."""
    is_main: bool = True
    """True if the table is always visible, False if it is collapsed."""


class Page(NamedTuple):
    """Section of an evaluator in the report."""

    short: str
    title: str
    introduction: str
    quantities: tuple[Quantity, ...]
    per_split: bool = True
    """False for an evaluator whose numbers are the same for every split."""
    pictures: str = ""
    """`module:function` that draws its pictures from its files: (results, teacher, store) -> list of PictureFigure
    (report/evaluator_sections.py)."""


def needs_nothing_else(context: EvaluationContext) -> Mapping[str, str]:
    """Check of an evaluator without requirements."""
    return {}


class Evaluator(NamedTuple):
    """An evaluator of one split."""

    run: Callable[[EvaluationContext], Mapping[str, Any]]
    """Function that computes the metrics of one split as JSON values, and writes large results to context.folder."""
    check: Callable[[EvaluationContext], Mapping[str, str]] = needs_nothing_else
    """Function called before anything is computed. It raises ConfigError if a requirement is missing, and returns
    path -> sha256 of the files that the evaluator reads in addition to the model, the store and the passes (such as
    another student)."""
    page: Page | None = None
    """Section in the report, None if the report shows the numbers elsewhere."""
