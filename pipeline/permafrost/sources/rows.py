"""Storage of a table's row in its record, so that any process can pack it without the table."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from permafrost.core.records import Content
from permafrost.store.table_rows import SUFFIX, RowError, encode_row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from permafrost.core.records import Record

ROW_KEY = "row-{:09d}"
"""Key of a row of a table without keys; sorting by key keeps the rows' order."""


def row_content(values: NDArray[np.float32]) -> tuple[str, ...]:
    """Return `Record.content` of a row [d]."""
    return (base64.b64encode(values.astype("<f4").tobytes()).decode(),)


def bad_row_content(error_message: str) -> tuple[str, ...]:
    """Return `Record.content` of a row that cannot be stored, with the reason."""
    return ("", error_message)


def read_row(record: Record) -> Content:
    """Return the row as it is stored; raise RowError if it cannot be stored."""
    encoded, *complaints = record.content
    if complaints:
        raise RowError(complaints[0])
    values = np.frombuffer(base64.b64decode(encoded), "<f4")
    return Content(image=encode_row(values), suffix=SUFFIX)
