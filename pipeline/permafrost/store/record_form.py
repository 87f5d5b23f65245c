"""Forms of records, images and rows of numbers, and all in which the two differ when they are read.

A record with places has positions in a plane: it is seen in views, explained by maps, and shown as a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from permafrost.core.errors import RecordError
from permafrost.store.codecs import RowError, decode_npy, decode_row
from permafrost.store.entries import ManifestError
from permafrost.store.image_decoding import ImageError, decode_part, decode_pixels, height_of_part
from permafrost.store.manifest import CanonicalFrame

if TYPE_CHECKING:  # packing needs no torch
    from torch import Tensor


def resize_pixels(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize pixels u8 [H, W, 3] to another (height, width): bilinear with antialiasing, rounded.

    Torch's kernel for bytes computes the same values on every processor.

    Args:
        pixels: Pixels of any strides.
        size: (height, width) of the result.
    """
    if pixels.shape[:2] == size:
        return pixels
    import torch
    import torch.nn.functional as F

    # The batch's stride decides whether torch knows the layout, and returns it.
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    image = image.contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


class RecordForm(ABC):
    """Form of the records of a store."""

    kind: ClassVar[Literal["image", "table"]]
    """Kind of the store in its manifest."""
    noun: ClassVar[str]
    """Name of several records' contents, for messages."""
    failure: ClassVar[type[RecordError]]
    """Exception class for a record that cannot be packed."""
    failed: ClassVar[str]
    """Participle of what could not be done to it, for messages."""
    has_places: ClassVar[bool]
    """True if records have positions in a plane."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) of the canonical frame, or (1, columns) of a row."""

    @property
    def num_columns(self) -> int | None:
        """Number of columns of a row, None for images."""
        return None

    def pictures(self, count: int) -> int:
        """Return the number of records to show as pictures, 0 for rows.

        Args:
            count: Number of pictures, if records can be shown as such.
        """
        return count if self.has_places else 0

    @abstractmethod
    def describe(self) -> str:
        """Describe the size as text."""

    @abstractmethod
    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of one record's input to a network.

        Args:
            size: Input size (height, width) of the network, or (1, columns).
        """

    @abstractmethod
    def memory(self, records: int) -> NDArray[Any]:
        """Return memory for decoded records, whose values are not yet set.

        Args:
            records: Number of records.
        """

    @property
    def record_bytes(self) -> int:
        """Bytes of a decoded record."""
        return self.memory(1).nbytes

    @abstractmethod
    def decode(self, data: bytes, memory: NDArray[Any], where: str) -> None:
        """Decode a record's content into its part of the memory.

        Args:
            data: Stored bytes of the record.
            memory: Part of `memory` for one record.
            where: File and record, for messages.

        Raises:
            ManifestError: If the bytes do not match the store's manifest.
        """

    @abstractmethod
    def tensor(self, values: NDArray[Any]) -> Tensor:
        """Return decoded records as a tensor, without a copy."""


@dataclass(frozen=True)
class ImageForm(RecordForm):
    """Images in a canonical frame: u8 [n, 3, H, W].

    Frames have channels last in memory, as decoders write them. Their transposition takes a fifth of the time of
    decoding, so it is left to the device, on the way to float32.
    """

    frame: CanonicalFrame

    kind = "image"
    noun = "images"
    failure = ImageError
    failed = "decoded"
    has_places = True

    @property
    def size(self) -> tuple[int, int]:
        return self.frame.height, self.frame.width

    def describe(self) -> str:
        size = f"{self.frame.width}x{self.frame.height}"
        return f"{size} (store.image_size, store.format={self.frame.format})"

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return 3, *size

    def memory(self, records: int) -> NDArray[Any]:
        return np.empty((records, *self.size, 3), np.uint8)

    def decode(self, data: bytes, memory: NDArray[Any], where: str) -> None:
        if self.frame.format == "raw":
            memory[:] = decode_npy(data, "uint8", memory.shape, where)
            return
        with report_damage(where):
            if (pixels := decode_pixels(data, memory)) is not memory:
                memory[:] = resize_pixels(pixels, self.size)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        import torch

        return torch.from_numpy(values).permute(0, 3, 1, 2)


def decode_original(
    data: bytes, size: tuple[int, int], where: str, rows: int | None = None, divisor: int = 1
) -> NDArray[np.uint8]:
    """Decode an original image at its own size, u8 [H, W, 3], or a part of it (`decode_part`).

    Args:
        data: Stored bytes of the record.
        size: (height, width) of the upright image in the index.
        where: File and record, for messages.
        rows: Number of its upper rows that are needed; None for all.
        divisor: Divisor of height and width where a JPEG may be decoded to less than its size.

    Raises:
        ManifestError: If the bytes cannot be decoded, or the image has another size.
    """
    with report_damage(where):
        pixels = decode_part(data, size, rows or size[0], divisor)
    height, width = pixels.shape[:2]
    upper = height_of_part(rows or size[0], size[0])
    if (height, width) not in (size, (-(-upper // divisor), -(-size[1] // divisor))):
        raise ManifestError(
            f"{where} has {width}x{height} pixels, and {size[1]}x{size[0]} in the index; run "
            "permafrost verify"
        )
    return pixels


@contextmanager
def report_damage(where: str) -> Iterator[None]:
    """Raise ManifestError for what a decoder raises."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types of exceptions for damaged bytes
        raise ManifestError(
            f"{where} cannot be decoded ({error}); run permafrost verify"
        ) from error


@dataclass(frozen=True)
class RowForm(RecordForm):
    """Rows of numbers: f32 [n, d]."""

    columns: tuple[str, ...]

    kind = "table"
    noun = "rows"
    failure = RowError
    failed = "stored"
    has_places = False

    @property
    def size(self) -> tuple[int, int]:
        return 1, self.num_columns

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    def describe(self) -> str:
        return f"{self.num_columns} columns"

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return size[1:]

    def memory(self, records: int) -> NDArray[Any]:
        return np.empty((records, self.num_columns), np.float32)

    def decode(self, data: bytes, memory: NDArray[Any], where: str) -> None:
        memory[:] = decode_row(data, len(memory), where)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        import torch

        return torch.from_numpy(values)
