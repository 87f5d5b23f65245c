"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.gpu.outcomes import CheckOutcome, Row

PARTS = ("wall", "host", "copy", "compute")


def markdown(machine: dict[str, Any], checks: Sequence[CheckOutcome], rows: Sequence[Row]) -> str:
    """Return the machine, the checks and the rows as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    lines = [about, "", "| check | result | seconds | |", "|---|---|---|---|"]
    lines += [f"| {c.name} | {c.status} | {c.seconds:.1f} | {_cell(c.reason)} |" for c in checks]
    lines += [
        "",
        f"| row | images/s | baseline | images/s | ratio | {' | '.join(f'{p} ms' for p in PARTS)} | GPU | |",
        "|" + "---|" * (len(PARTS) + 7),
    ]
    lines += [_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _row(row: Row) -> str:
    if row.status != "measured":
        return f"| {row.name} |{' |' * (len(PARTS) + 5)} {row.status}: {_cell(row.reason)} |"
    used = "not measured" if row.utilization is None else f"{row.utilization:.0f} %"
    parts = " | ".join(_number(row.milliseconds.get(part)) for part in PARTS)
    return (
        f"| {row.name} | {_number(row.images_per_second)} | {row.baseline} | "
        f"{_number(row.baseline_images_per_second)} | {_number(row.ratio)} | {parts} | {used} | {_cell(row.reason)} |"
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
