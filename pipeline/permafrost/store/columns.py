"""Columns of a store's index; docs/reference/store-format.md says what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np

INDEX_FOLDER = "index"
"""Folder of the columns."""
OFFSETS = "_offsets"
"""End of the name of the column that says where each row's values begin in a column of lists."""

NUMBERS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("offset", "size", "mask_offset", "mask_size"), np.dtype("<i8")),
    **dict.fromkeys(("height", "width", "label", "group"), np.dtype("<i4")),
    "orientation": np.dtype("i1"),
    **dict.fromkeys(("image_crc32c", "mask_crc32c"), np.dtype("<u4")),
}
"""Dtype of each column with a number per record."""
BOX_FIELDS = ("label", "x0", "y0", "x1", "y1")
LISTS: dict[str, np.dtype[Any]] = {
    "key": np.dtype("u1"),
    "labels": np.dtype("<i4"),
    "boxes": np.dtype(("<f4", len(BOX_FIELDS))),
}
"""Dtype of the values of each column of lists."""
COLUMNS: dict[str, np.dtype[Any]] = {
    **NUMBERS,
    **LISTS,
    **dict.fromkeys((f"{name}{OFFSETS}" for name in LISTS), np.dtype("<i8")),
    "image_sha256": np.dtype(("u1", 32)),
}
"""Dtype of each column. A store may have others, which readers ignore."""
DTYPES = COLUMNS | {"weight": np.dtype("<f4")}
"""Dtype of each column, also of the weights, which only stores of data with weights have."""
