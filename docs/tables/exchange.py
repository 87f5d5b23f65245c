"""Tables of targets from other tools: what a student receives beside their own readers, and verdicts of passports."""

from __future__ import annotations

import json
from typing import Any

from docs.cells import Cell, Rows, table
from docs.measured import ROOT

_TESTS = ROOT / "tests" / "exchange"
_FORMATS = {
    "`fkd`": ("fkd_k5", "fkd_k10", "fkd_renorm", "fkd_smoothing", "fkd_hard", "fkd_fp16"),
    "`imagenet_plus`, crops and flips": ("imagenet_plus",),
    "`imagenet_plus`, RandAugment and erasing": (
        "imagenet_plus_randaug",
        "imagenet_plus_mappings",
    ),
    "`imagenet_plus`, CIFAR-100+": ("cifar100_plus",),
    "`imagenet_plus`, Flowers-102+ and Food-101+": ("flowers102_plus",),
    "`datacompdr`": ("datacompdr", "datacompdr_bfloat16"),
    "`tinyvit`, joined by position": ("tinyvit",),
    "`relabel`, whole images": ("relabel",),
    "`relabel`, drawn crops": ("relabel_crops",),
    "`theia`": ("theia",),
    "`e2kd`, GradCAM and B-cos": ("e2kd_gradcam", "e2kd_bcos"),
}
_SITUATIONS = {
    "None": "none",
    "temperature": "another temperature",
    "classes": "another order of the classes",
    "rows": "rows of other records",
    "preprocessing": "another part, size, channel order or normalization of the image",
    "maps": "maps turned, mirrored, negative or of other records",
    "unknown": "one that is not looked for (other weights, blurred images, noise, ...)",
}


def _difference(rows: list[dict[str, Any]], *columns: str) -> Cell:
    """Write the largest difference of some columns."""
    values = [row[column] for row in rows for column in columns if column in row]
    if not values:
        return Cell("")
    largest = max(values)
    digits, _, power = f"{largest:.0e}".partition("e")
    return Cell("0" if largest == 0 else f"{digits}e{int(power)}")


def _correlation(rows: list[dict[str, Any]], column: str) -> Cell:
    """Write the median of correlations and the lowest."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return Cell("")
    lowest, middle = min(v[0] for v in values), min(v[1] for v in values)
    texts = [f"{value:.3f}".removeprefix("0") for value in (middle, lowest)]
    return Cell(f"{texts[0]} ({texts[1]})")


def conformance() -> str:
    """Differences of what a student receives here from what each tool's own reader yields."""
    measured = json.loads((_TESTS / "conformance" / "table.json").read_text())
    rows: Rows = []
    for label, names in _FORMATS.items():
        numbers = [measured[name] for name in names]
        rows.append(
            (
                label,
                [
                    _difference(numbers, "targets"),
                    _difference(numbers, "maps"),
                    _difference(numbers, "boxes"),
                    _correlation(numbers, "pixels"),
                    _correlation(numbers, "beyond"),
                ],
            )
        )
    columns = ("`format=`", "targets", "maps", "boxes", "pixels", "pixels, shear and others")
    return table(columns, rows)


def passport_situations() -> str:
    """Verdicts of passports on generated situations."""
    counts = json.loads((_TESTS / "situations.json").read_text())
    rows: Rows = []
    for cause, label in _SITUATIONS.items():
        each = counts[cause]
        texts = [sum(each.values()), *(each.get(n, 0) for n in ("right", "miss"))]
        texts.append(each.get("wrong", 0) + each.get("false alarm", 0))
        rows.append((label, [Cell(str(text)) for text in texts]))
    columns = ("what is wrong", "situations", "right", "missed", "wrong cause, false alarm")
    return table(columns, rows)


TABLES = (conformance, passport_situations)
