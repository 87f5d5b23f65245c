"""The interface of an evaluator: how it runs, what it checks first, and the quantities that the report shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.options import resolve_implementation

if TYPE_CHECKING:
    from permafrost.evaluation.context import EvaluationContext


class Metric(NamedTuple):
    """Direction and display format of a metric."""

    higher_is_better: bool | None = True
    """Direction of improvement, None if neither higher nor lower is better."""
    scale: float = 100.0
    """Factor for display: 100 shows a fraction in per cent."""
    digits: int = 3
    """Decimal places of a metric that is not a fraction."""


METRICS = {
    "accuracy": Metric(),
    "mean_class_accuracy": Metric(),
    # These four replace accuracy if records have many labels.
    "f1": Metric(),
    "macro_f1": Metric(),
    "macro_average_precision": Metric(),
    "macro_auroc": Metric(),
    "worst_group_accuracy": Metric(),
    "agreement": Metric(),
    "kl_to_teacher": Metric(higher_is_better=False, scale=1.0),  # nats
    "epg": Metric(),
    "iou": Metric(),
    "map_cosine": Metric(),
}
"""Metrics of forward.evaluate_split. Some need groups, regions or a teacher."""

PLAIN = Metric(higher_is_better=None, scale=1.0)
"""A metric for which neither higher nor lower is better."""
MORE = Metric(scale=1.0)
"""A number; higher is better."""
LESS = Metric(higher_is_better=False, scale=1.0)
"""A number; lower is better."""
PER_CENT = Metric()
"""A fraction in percent; higher is better."""
LESS_PER_CENT = Metric(higher_is_better=False)
"""A fraction in percent; lower is better."""
COUNT = Metric(scale=1.0, digits=0)
"""A count."""


def numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten a split's metrics to numbers by name: accuracy, group_accuracy.0, <evaluator>.<quantity>.<layer>.

    Args:
        metrics: Metrics of a split, as in metrics.json.
        prefix: First part of the names.
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            numbers |= numbers_of(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers


def main_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a split's metrics that are always shown: an evaluator with a page names them there.

    Without a page, a mapping of more than ten numbers is left out, such as the scores of many labels or groups.

    Args:
        metrics: Metrics of a split, as in metrics.json.
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        page = evaluator_named(name).page if name in EVALUATORS else None
        few = {name: value} if page or not isinstance(value, Mapping) or len(value) <= _FEW else {}
        main = [
            f"{name}.{each.name}." for each in (page.quantities if page else ()) if each.is_main
        ]
        numbers |= {
            key: number
            for key, number in numbers_of(few).items()
            if page is None or f"{key}.".startswith(tuple(main))
        }
    return numbers


def interval_of(numbers: Mapping[str, float], name: str) -> tuple[float, float] | None:
    """Return the 95 % interval over records of a number <evaluator>.<quantity>.<part>, None without one.

    Args:
        numbers: Numbers of a split by name.
        name: Name of one of them.
    """
    quantity, _, part = name.partition(".")[2].partition(".")
    start = name.partition(".")[0] + "." + quantity
    ends = [numbers.get(f"{start}_{end}.{part}") for end in ("low", "high")]
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


_FEW = 10
"""Largest number of entries of a mapping without a page that is always shown."""


def best_position(values: Sequence[float], metric: Metric) -> int:
    """Return the position of the best value, the first of equal ones.

    Args:
        values: Values, not empty.
        metric: Metric whose direction decides; without one, the lowest value is the best.
    """
    sign = 1 if metric.higher_is_better else -1
    return max(range(len(values)), key=lambda position: sign * values[position])


# ---- evaluator -------------------------------------------------------------------------------------


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align the cells of a table with spaces, one line per row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


class Quantity(NamedTuple):
    """A quantity of an evaluator: its metric and its table in the report."""

    name: str
    """Name <quantity> or <quantity>.<part> of a number, or of a mapping from names to numbers."""
    caption: str
    meaning: str
    """One sentence that explains the numbers, for the report."""
    metric: Metric = PLAIN
    plot: str = ""
    """Kind of plot: "line" (a curve per variant over the numbers' names), "bar" (variants side by side) or none."""
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
    remarks: str = ""
    """`module:function` that returns sentences on the evaluator's metrics of a network on a split, where they say less
    than they seem to."""
    pictures: str = ""
    """`module:function` that draws its pictures from its files: (results, teacher, store) -> list of PictureFigure
    (permafrost_report/evaluator_sections.py)."""


class Evaluator(NamedTuple):
    """An evaluator of one split."""

    run: Callable[[EvaluationContext], Mapping[str, Any]]
    """Function that computes the metrics of one split as JSON values, and writes large results to context.folder."""
    check: Callable[[EvaluationContext], Mapping[str, str] | None] = lambda context: None
    """Function called before anything is computed. It raises ConfigError if a requirement is missing, and returns
    path -> sha256 of the files that the evaluator reads in addition to the model, the store and the passes (such as
    another student), or None for none."""
    page: Page | None = None
    """Section in the report, None if the report shows the numbers elsewhere."""


# ---- quantities ------------------------------------------------------------------------------------


def metric_of(name: str) -> Metric | None:
    """Return the Metric of a name, or None if neither direction is better.

    Args:
        name: Name of METRICS, such as accuracy, or <evaluator>.<quantity>, or either followed by the name of a part,
            and by @<pass> if it is of an evaluation against a named pass.
    """
    if (name := name.partition("@")[0]) in METRICS:
        return METRICS[name]
    evaluator, _, quantity = name.partition(".")
    if evaluator not in EVALUATORS:
        return None
    known = comparable_quantities(evaluator)
    return next(
        (metric for prefix, metric in known.items() if f"{quantity}.".startswith(f"{prefix}.")),
        None,
    )


def comparable_quantities(evaluator: str) -> dict[str, Metric]:
    """Return the quantities of an evaluator for which higher or lower is better."""
    page = evaluator_named(evaluator).page
    return {
        quantity.name: quantity.metric
        for quantity in (() if page is None else page.quantities)
        if quantity.metric.higher_is_better is not None
    }


def comparable_metrics() -> list[str]:
    """Return all names that `metric_of` accepts, without parts."""
    names = [
        f"{evaluator}.{quantity}"
        for evaluator in EVALUATORS
        for quantity in comparable_quantities(evaluator)
    ]
    return [*METRICS, *names]


def evaluators_of(name: str) -> tuple[str, ...] | None:
    """Return the evaluator of a metric, as a value of the option `evaluators`.

    It is None for a metric of every evaluation.
    """
    evaluator = name.partition(".")[0]
    return (evaluator,) if evaluator in EVALUATORS and "." in name else None


# ---- build -----------------------------------------------------------------------------------------


def evaluator_named(name: str) -> Evaluator:
    """Return the evaluator of that name in config.evaluation.EVALUATORS."""
    return resolve_implementation(EVALUATORS[name])  # type: ignore[no-any-return]
