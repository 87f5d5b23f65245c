"""A table's row inside its record: the values themselves, so that any process packs it without the table."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.records import Content
from pipeline.store.table_rows import SUFFIX, RowError, encode_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.core.records import Record

ROW_KEY = "row-{:09d}"
"""Of a table without keys of its own: sorted as it is."""


def row_content(values: NDArray[np.float32]) -> tuple[str, ...]:
    """`Record.content` of a row [d]."""
    return (base64.b64encode(values.astype("<f4").tobytes()).decode(),)


def bad_row_content(error_message: str) -> tuple[str, ...]:
    """`Record.content` of a row that cannot be stored, and why."""
    return ("", error_message)


def read_row(record: Record) -> Content:
    """The row as its store has it; RowError where it cannot be stored."""
    encoded, *complaints = record.content
    if complaints:
        raise RowError(complaints[0])
    values = np.frombuffer(base64.b64decode(encoded), "<f4")
    return Content(image=encode_row(values), suffix=SUFFIX)
