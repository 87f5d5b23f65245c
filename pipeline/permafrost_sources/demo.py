"""The demo's images: handwritten digits on photographs.

There are 1,797 images of 8x8 pixels in 17 levels of gray, of ten classes. They are the test set of a larger data set
(Alpaydin and Kaynak, UCI 1998), written by 13 people.

Real digits (scikit-learn's `load_digits`, 8x8) are pasted at a random position, size and contrasting color onto
grayscale crops of two real photographs (`load_sample_images`). The class is the digit. In the split `train` the
photograph is fully tied to the digit's parity, like the background in Waterbirds-100 (Sagawa et al. 2020, Petryk et
al. 2022), so the photograph alone separates half of the classes from the others. `teacher` has both photographs for
every digit. `test` is tied like `train`. `test_swapped` shows the same digits at the same positions on the other
photograph. The test splits share no digit with `teacher` or `train`.

The crops are gray and of equal exposure. A color or a brightness would identify a photograph in any single pixel,
including those around the digit, and no explanation could then tell a student where not to look. A photograph is
therefore recognized by its texture over an area, which is evidence outside the digit. The texture is also strong
enough that the digit has to be found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from permafrost.core.records import Box, Content, ImageSource, Record
from permafrost.sources.splits import TRAIN, split_off_test
from permafrost.store.image_decoding import png_of
from permafrost_sources.options import DemoDataConfig, DigitsDataConfig

_SIDE = 8
_LEVELS = 16


class DigitsSource(ImageSource):
    """Source of digits in white ink on black, as in MNIST; a record's key is its number in scikit-learn's set."""

    name = "digits"
    classes = tuple(str(digit) for digit in range(10))
    frame_size = (_SIDE, _SIDE)

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
    return png_of(Image.fromarray(pixels))


def box_around(mask: NDArray[np.bool_], label: int) -> Box:
    """Return the box around the pixels of a mask [side, side] that has any."""
    rows, columns = np.nonzero(mask)
    scale = 2.0 / len(mask)
    return Box(
        label=label,
        x0=float(columns.min() * scale - 1),
        y0=float(rows.min() * scale - 1),
        x1=float((columns.max() + 1) * scale - 1),
        y1=float((rows.max() + 1) * scale - 1),
    )


# ---- demo ------------------------------------------------------------------------------------------


PHOTOGRAPHS = ("china", "flower")
INK = 0.25
"""Fraction of ink above which a pixel belongs to the digit's mask."""
CONTRAST = 0.14
"""Standard deviation of a crop's brightness, whose mean is one half."""
MIN_STD = 0.08
"""Smallest standard deviation of the original crop to normalize by, so that a plain sky is not amplified to
noise."""
SPLITS = {"teacher": 1, "train": 2, "test": 3, "test_swapped": 3}
"""Series from which the placements of each split are drawn. Only the two test splits share one."""


@dataclass(frozen=True)
class Placement:
    """Position of a pasted digit in its frame, in pixels, and the crops of the photograph behind it."""

    size: int
    left: int
    top: int
    crops: NDArray[np.int64]
    """[candidates, 3]: side, left and top of crops of the photograph; the one with the highest contrast is
    used."""
    hue: NDArray[np.float64]
    """[3] in [0, 1]: position of each color channel between the contrasting extremes."""


class DemoSource(ImageSource):
    """Source of digits on photographs; every record is drawn from (seed, digit, placement) only."""

    name = "demo"
    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, config: DemoDataConfig) -> None:
        self.config = config
        self.frame_size: tuple[int, int] | None = (config.image_size, config.image_size)

    def records(self) -> Iterator[Record]:
        """Yield all records, with 2 * (digit is odd) + photograph as group and boxes around the digit's ink."""
        labels = load_digit_images()[1]
        order = np.random.default_rng([self.config.seed, 0]).permutation(len(labels))
        num_test, num_train = self.config.test_digits, self.config.train_digits
        digits = {
            "test": order[:num_test],
            "test_swapped": order[:num_test],
            "train": order[num_test : num_test + num_train],
            "teacher": order[num_test:][: self.config.teacher_digits],
        }
        placements = {
            "teacher": self.config.teacher_placements,
            "train": self.config.train_placements,
        }
        return (
            self._record(split, int(digit), placement, int(labels[digit]))
            for split in SPLITS
            for digit in digits[split]
            for placement in range(placements.get(split, self.config.test_placements))
        )

    def read(self, record: Record) -> Content:
        """Return the frame and the digit's mask, both as PNG of `data.image_size` squared."""
        series, digit, number, photograph = record.content
        frame, ink = self._paste(digit, self._placement(series, digit, number), photograph)
        mask = np.where(ink > INK, 255, 0).astype(np.uint8)
        return Content(image=encode_png(frame), suffix="png", mask=encode_png(mask))

    def where(self, record: Record) -> str:
        """Return a fixed phrase, because the demo set is drawn and not read."""
        return "of the demo set"

    def _record(self, split: str, digit: int, placement: int, label: int) -> Record:
        odd = label % 2
        photograph = {"teacher": (digit + placement) % 2, "test_swapped": 1 - odd}.get(split, odd)
        paste = (SPLITS[split], digit, placement)
        return Record(
            key=f"{split}_{digit:04d}_{placement}",
            split=split,
            label=label,
            group=2 * odd + photograph,
            boxes=(box_around(self._ink(digit, self._placement(*paste)) > INK, label),),
            content=(*paste, photograph),
        )

    def _placement(self, series: int, digit: int, number: int) -> Placement:
        generator = np.random.default_rng([self.config.seed, series, digit, number])
        side = self.config.image_size
        size = int(generator.integers(self.config.min_digit_size, self.config.max_digit_size + 1))
        left, top = (int(generator.integers(0, side - size + 1)) for _ in range(2))
        width, height = load_photographs()[0].size
        sides = generator.integers(side, 2 * side, 4)
        corners = (generator.integers(0, extent - sides + 1) for extent in (width, height))
        return Placement(size, left, top, np.stack([sides, *corners], axis=1), generator.random(3))

    def _ink(self, digit: int, placement: Placement) -> NDArray[np.float64]:
        side = self.config.image_size
        strokes = Image.fromarray(load_digit_images()[0][digit])
        resized = strokes.resize((placement.size, placement.size), Image.Resampling.BICUBIC)
        ink = np.zeros((side, side))
        rows = slice(placement.top, placement.top + placement.size)
        columns = slice(placement.left, placement.left + placement.size)
        ink[rows, columns] = np.asarray(resized, dtype=np.float64) / 255
        return ink

    def _paste(
        self, digit: int, placement: Placement, photograph: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        ink = self._ink(digit, placement)
        candidates = self._backgrounds(photograph, placement.crops)
        # Dark ink for a bright position, and bright ink for a dark one, [candidates, 3].
        behind = (candidates * ink).sum(axis=(1, 2)) / ink.sum()
        hue = 0.3 * placement.hue
        colors = np.where(behind[:, None] > 0.5, hue, 1 - hue)
        best = int(np.argmax(_contrasts(candidates, colors, ink)))
        alpha = ink[:, :, None]
        frame = candidates[best][:, :, None] * (1 - alpha) + colors[best] * alpha
        return np.round(frame * 255).astype(np.uint8), ink

    def _backgrounds(self, photograph: int, crops: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the crops in equal exposure, [candidates, side, side] in [0, 1]."""
        size = (self.config.image_size, self.config.image_size)
        resized = [
            load_photographs()[photograph]
            .crop((left, top, left + side, top + side))
            .resize(size, Image.Resampling.BILINEAR)
            for side, left, top in crops.tolist()
        ]
        gray = np.stack([np.asarray(image) for image in resized]).reshape(len(crops), -1) / 255
        spread = np.maximum(gray.std(axis=1), MIN_STD)[:, None]
        exposed = 0.5 + CONTRAST * (gray - gray.mean(axis=1, keepdims=True)) / spread
        backgrounds: NDArray[np.float64] = exposed.clip(0, 1).reshape(len(crops), *size)
        return backgrounds


def _contrasts(
    backgrounds: NDArray[np.float64], colors: NDArray[np.float64], ink: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the differences in brightness of color and background behind the ink, at their lowest decile."""
    differences = np.abs(backgrounds[:, ink > 0.5] - colors.mean(axis=1)[:, None])
    contrasts: NDArray[np.float64] = np.quantile(differences, 0.1, axis=1)
    return contrasts


@lru_cache(maxsize=1)
def load_photographs() -> list[Image.Image]:
    """Load the two sample photographs in gray, 640x427 pixels, in the order of PHOTOGRAPHS."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    by_name = dict(
        zip((name.split("/")[-1] for name in samples.filenames), samples.images, strict=True)
    )
    return [Image.fromarray(by_name[f"{name}.jpg"]).convert("L") for name in PHOTOGRAPHS]
