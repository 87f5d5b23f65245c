"""Handwritten digits of scikit-learn as small images, without a download.

There are 1,797 images of 8x8 pixels in 17 levels of gray, of ten classes. They are the test set of a larger data set
(Alpaydin and Kaynak, UCI 1998), written by 13 people.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from permafrost.core.records import Content, Record
from permafrost.sources.splits import TRAIN, split_off_test

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from permafrost.config.data import DigitsDataConfig

_SIDE = 8
_LEVELS = 16


class DigitsSource:
    """Source of digits in white ink on black, as in MNIST; a record's key is its number in scikit-learn's set."""

    name = "digits"
    revision = 1
    classes = tuple(str(digit) for digit in range(10))
    frame_size: tuple[int, int] | None = (_SIDE, _SIDE)
    columns = None

    def __init__(self, config: DigitsDataConfig) -> None:
        self.config = config

    def records(self) -> Iterator[Record]:
        """Yield all records, in split train except for `data.test_fraction` of them."""
        labels = load_digit_images()[1]
        records = (
            Record(key=f"digit_{number:04d}", split=TRAIN, label=int(label), content=(number,))
            for number, label in enumerate(labels)
        )
        return split_off_test(records, self.config.test_fraction)

    def read(self, record: Record) -> Content:
        """Return a PNG of three equal channels."""
        (number,) = record.content
        return Content(
            image=encode_png(np.repeat(load_digit_images()[0][number][:, :, None], 3, axis=2)),
            suffix="png",
        )

    def where(self, record: Record) -> str:
        """Return the record's number in scikit-learn's set, because there is no file."""
        return f"{record.key} of scikit-learn's digits"


@lru_cache(maxsize=1)
def load_digit_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load the 1,797 digits as u8 [N, 8, 8] (255 is full ink) and their labels [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / _LEVELS)).astype(np.uint8), digits.target


def encode_png(pixels: NDArray[Any]) -> bytes:
    """Encode u8 [H, W] or [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
