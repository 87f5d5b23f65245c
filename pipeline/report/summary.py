"""A sweep's results as text, for whoever waits at a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.config.points import point_label
from pipeline.evaluation.metrics import METRICS, Metric
from pipeline.report.results import StudentResult, load_results, load_selection, summarise

_SHOWN = ("accuracy", "f1", "agreement")


def summary_table(run: str) -> str:
    """A row an arm (and point): mean +- standard deviation over seeds, per cent."""
    members: dict[str, list[StudentResult]] = defaultdict(list)
    for result in load_results(run):
        members[result.label].append(result)
    selection = load_selection(run)
    chosen = {c.arm: c for c in selection.candidates if c.chosen} if selection else {}
    sources = _sources([result for results in members.values() for result in results])
    header = ["arm", "seeds", *([selection.select] if selection else []), *sources]
    rows = []
    for label, results in members.items():
        row = [label, str(len(results))]
        if selection is not None:
            candidate = chosen[results[0].arm]
            row[0] = f"{label} {point_label(candidate.point)}".strip()
            row.append(_spread(candidate.values, selection.metric))
        row += [_column(results, source) for source in sources]
        rows.append(row)
    return _aligned([header, *rows])


def _sources(results: Sequence[StudentResult]) -> list[str]:
    """Columns that at least one student has a value for, as <split>.<metric>."""
    found = {
        f"{split}.{name}": None
        for result in results
        for split, metrics in result.metrics.items()
        for name in _SHOWN
        if name in metrics
    }
    return list(found)


def _column(results: Sequence[StudentResult], source: str) -> str:
    split, _, name = source.rpartition(".")
    values = [r.metrics[split][name] for r in results if name in r.metrics.get(split, {})]
    return _spread(values, METRICS[name]) if len(values) == len(results) else "-"


def _spread(values: Sequence[float], metric: Metric) -> str:
    summary = summarise(values)
    digits = 1 if metric.scale == 100 else 3
    mean, sd = (f"{metric.scale * summary[name]:.{digits}f}" for name in ("mean", "sd"))
    return f"{mean} +- {sd}" if len(values) > 1 else mean


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
