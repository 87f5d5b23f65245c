"""Text summary of a sweep's results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.points import point_label
from pipeline.report.columns import Column, arm_summary, student_rows
from pipeline.report.results import StudentResult, load_results, load_selection, summarize

_SHOWN = ("accuracy", "f1", "agreement")


def summary_table(run: str) -> str:
    """Format one row per arm (and point): mean +- standard deviation over seeds, in per cent."""
    results = load_results(run)
    columns = [Column(name=source, source=source) for source in _sources(results)]
    points = {result.label: result.arm for result in results}
    selection = load_selection(run)
    chosen = {c.arm: c for c in selection.candidates if c.chosen} if selection else {}
    selected = [selection.select] if selection else []
    table = [["arm", "seeds", *selected, *(column.name for column in columns)]]
    for arm in arm_summary(student_rows(results, columns), columns):
        row = [arm["method"], str(arm["seeds"])]
        if selection is not None:
            candidate = chosen[points[arm["method"]]]
            row[0] = f"{row[0]} {point_label(candidate.point)}".strip()
            known = Column(name="", source=f"all.{selection.select}", known=selection.metric)
            row.append(_spread(known, summarize(candidate.values), len(candidate.values)))
        row += [_spread(column, arm[column.name], arm["seeds"]) for column in columns]
        table.append(row)
    return _aligned(table)


def _sources(results: Sequence[StudentResult]) -> list[str]:
    """Sources <split>.<metric> for which at least one student has a value."""
    found = {
        f"{split}.{name}": None
        for result in results
        for split, metrics in result.metrics.items()
        for name in _SHOWN
        if name in metrics
    }
    return list(found)


def _spread(column: Column, summary: dict[str, float] | None, seeds: int) -> str:
    if summary is None:
        return "-"
    mean, sd = (column.text(summary[name]) for name in ("mean", "sd"))
    return f"{mean} +- {sd}" if seeds > 1 else mean


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
