"""Targets of photographs that EXIF turns, and that the tool's own loader does not.

Stores hold upright images. A tool that opens photographs as Pillow does has shown its teacher the stored pixels, so its
boxes, views and maps are those of the image before it is turned. They are turned with it: a view then shows a student
the pixels that the teacher saw, and a map lies on what it explains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import require
from permafrost.core.records import MOVE_FIELD, WINDOW_FIELD
from permafrost.store.image_decoding import STORED_FROM_UPRIGHT
from permafrost_exchange.encoding import has_places
from permafrost_exchange.target_reader import Arrays, ReadRequest

_MATRICES = np.array([np.eye(2), *STORED_FROM_UPRIGHT.values()])
"""Matrices by orientation, f64 [9, 2, 2]."""
_FIRST_ON_ITS_SIDE = 5
"""Orientation from which on height and width are exchanged."""


def in_stored_pixels(request: ReadRequest) -> ReadRequest:
    """Return a request whose sizes and views are those of the pixels before they are turned upright."""
    is_on_side = request.orientations >= _FIRST_ON_ITS_SIDE
    views = request.views
    return request._replace(
        heights=np.where(is_on_side, request.widths, request.heights),
        widths=np.where(is_on_side, request.heights, request.widths),
        views=None if views is None else _turn_views(views, _MATRICES[request.orientations]),
    )


def turn_upright(arrays: Arrays, orientations: NDArray[np.int8]) -> Arrays:
    """Return targets of the upright images.

    Args:
        arrays: Targets of the pixels before they are turned, [n, V, ...] each.
        orientations: EXIF orientation of each record, i8 [n].

    Raises:
        ValueError: If maps are not square, and some would have height and width exchanged.
    """
    if WINDOW_FIELD.name in arrays:  # whose maps are those of the views
        return {**arrays, **_turn_views(arrays, np.swapaxes(_MATRICES[orientations], 1, 2))}
    return {
        name: _turn_maps(name, array, orientations) if has_places(name) else array
        for name, array in arrays.items()
    }


def _turn_views(views: Arrays, turns: NDArray[np.float64]) -> Arrays:
    """Turn windows [n, V, 4] and moves [n, V, 1, 2, 3] by matrices [n, 2, 2].

    A window stays upright. A turn by 90 degrees exchanges its sides, and so the rows of the matrix that moves it.
    """
    windows, moves = views[WINDOW_FIELD.name], views[MOVE_FIELD.name]
    is_on_side = (turns[:, 0, 0] == 0)[:, None]
    signs = turns.sum(axis=2)[:, None]
    scales = np.where(is_on_side[..., None], windows[..., 1::-1], windows[..., :2]) * signs
    shifts = np.einsum("nij,nvj->nvi", turns, windows[..., 2:])
    return {
        WINDOW_FIELD.name: np.concatenate([scales, shifts], axis=2).astype(np.float32),
        MOVE_FIELD.name: np.where(is_on_side[..., None, None, None], moves[..., ::-1, :], moves),
    }


def _turn_maps(name: str, maps: NDArray[Any], orientations: NDArray[np.int8]) -> NDArray[Any]:
    """Turn maps [n, V, ..., h, w] upright."""
    require(
        maps.shape[-1] == maps.shape[-2] or not (orientations >= _FIRST_ON_ITS_SIDE).any(),
        f"{name} has {maps.shape[-2]}x{maps.shape[-1]} cells, and photographs that EXIF turns by 90 degrees would "
        f"have {maps.shape[-1]}x{maps.shape[-2]}; leave them out of the files and set missing=missing.txt",
        ValueError,
    )
    result = maps.copy()
    for row in np.flatnonzero(orientations != 1):
        (a, b), (c, d) = STORED_FROM_UPRIGHT[int(orientations[row])]
        each, along_x, along_y = maps[row], a, d
        if b:
            each, along_x, along_y = np.swapaxes(each, -1, -2), c, b
        result[row] = each[..., ::along_y, ::along_x]
    return result
