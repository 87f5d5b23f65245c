"""Text summary of a sweep's results for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from permafrost.config.points import point_label
from permafrost.report.columns import (
    Column,
    arm_summary,
    chance_row,
    default_columns,
    student_rows,
)
from permafrost.report.comparison import ONE_SEED, summarize
from permafrost.report.results import load_results
from permafrost.report.selection import load_selection


def summary_table(run: str) -> str:
    """Format one row per arm (and point), mean +- standard deviation over seeds in per cent, and the chance levels."""
    results = load_results(run)
    columns = [Column(name=c.source, source=c.source) for c in default_columns(results)]
    points = {result.label: result.arm for result in results}
    selection = load_selection(run)
    chosen = {c.arm: c for c in selection.candidates if c.chosen} if selection else {}
    selected = [selection.select] if selection else []
    table = [["arm", "seeds", *selected, *(column.name for column in columns)]]
    arms = arm_summary(student_rows(results, columns), columns)
    for arm in arms:
        row = [arm["method"], str(arm["seeds"])]
        if selection is not None:
            candidate = chosen[points[arm["method"]]]
            row[0] = f"{row[0]} {point_label(candidate.point)}".strip()
            known = Column(name="", source=f"all.{selection.select}", known=selection.metric)
            row.append(_spread(known, summarize(candidate.values)))
        row += ["-" if arm[c.name] is None else _spread(c, arm[c.name]) for c in columns]
        table.append(row)
    chance = chance_row(results, columns)
    if chance:
        levels = [
            column.text(chance[c]) if (c := column.name) in chance else "-" for column in columns
        ]
        table.append(["chance", "", *("" for _ in selected), *levels])
    one_seed = [f"({ONE_SEED})"] if any(arm["seeds"] == 1 for arm in arms) else []
    return "\n".join([align_columns(table), *one_seed])


def _spread(column: Column, summary: dict[str, float | None]) -> str:
    return column.spread(summary).replace("±", "+-")


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align the cells of a table with spaces, one line per row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
