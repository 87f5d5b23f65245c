"""Conversion of masks to the form of a store: PNG with one channel of 8 bits."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from permafrost.store.pixels import ImageError, open_image

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_mask_png(data: bytes, path: str) -> bytes:
    """Convert a mask file to 8-bit gray PNG with unchanged values; such a file itself is returned as it is.

    A palette's indices become the gray values, as in PASCAL VOC. Black and white become 0 and 255.

    path  for messages
    """
    try:
        with open_image(data) as image:
            image.load()
            if image.format == "PNG" and image.mode == "L":
                return data
            values = _mask_values(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"mask {path} cannot be used: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def _mask_values(image: Image.Image) -> NDArray[np.uint8]:
    """Return the values [H, W]; raise ValueError if they do not fit into one byte per pixel."""
    pixels: NDArray[Any] = np.asarray(image)
    if pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    if image.mode in ("LA", "RGB", "RGBA"):
        colors = pixels[:, :, :1] if image.mode == "LA" else pixels[:, :, :3]
        pixels = pixels[:, :, 0]
        if (colors != pixels[:, :, None]).any():
            raise ValueError("it has colors; save it with one channel")
    values = pixels.astype(np.uint8)
    if pixels.ndim != 2 or (values != pixels).any():
        raise ValueError(f"its values ({image.mode}) do not fit into one byte per pixel")
    return values
