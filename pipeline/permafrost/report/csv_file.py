"""Numbers of a report as CSV, one row per student."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from permafrost.report.columns import Column


def student_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Format the rows of the students, with fractions as they are and no value as an empty cell."""
    text = io.StringIO()
    names = ["method", "seed", *(column.name for column in columns)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
