"""Decoding of image files of any supported kind to upright RGB pixels, and encoding of re-encoded frames.

Grayscale is repeated, CMYK converted, a palette looked up, 16 bits scaled to 8, and transparency blended onto white.
The EXIF orientation is applied here and only here.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

# Pillow opens a format requested by name only if its plugin has been imported.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from permafrost.core.errors import RecordError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image, a quarter of a GiB as RGB. Larger files are treated as decompression
bombs."""
MAX_IMAGE_BYTES = 3 * MAX_PIXELS + 2**12
"""Largest size of an image's file: that of the largest image without compression."""

_TOO_MANY_PIXELS = (
    f"it claims more than {MAX_PIXELS:,} pixels: a decompression bomb, or an image to make smaller"
)
_JPEG = b"\xff\xd8\xff"
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_COLOR_SPACES = ("YCbCr", "Gray", "RGB")
_NPY = b"\x93NUMPY"
_SIXTEEN_TO_EIGHT_BITS = 257
_JPEG_QUALITY = 95
_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that undoes it. (`ImageOps.exif_transpose` also rewrites the EXIF data, and
fails if they are damaged.)"""


FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP")
"""Formats of Pillow that are accepted, independent of the file's name. Others are excluded on purpose: some
start programs (an EPS is passed to Ghostscript), and many have rarely tested parsers."""


class ImageError(RecordError):
    """Image that cannot be decoded."""


def open_image(data: bytes) -> Image.Image:
    """Open the image in these bytes, of one of FORMATS, without decoding it. Raises ImageError if it is too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(_TOO_MANY_PIXELS) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels: {_TOO_MANY_PIXELS}")
    return image


def inspect_image(data: bytes) -> tuple[int, int]:
    """Return the upright (height, width) of an image that decodes to its last byte; raise ImageError otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the check of open_image is stricter
            image = open_image(data)
        with image:
            upright = _to_rgb(image)
            if image.format == "PNG":
                _check_png(data)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its text has a memory address, and manifests contain reasons
        raise ImageError("cannot be decoded: not an image of a known kind") from None
    except Exception as error:  # Pillow's parsers raise many types of exceptions
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from error
    return upright.height, upright.width


def decode_rgb(data: bytes) -> Tensor:
    """Decode upright pixels u8 [3, H, W], with channels last in memory, as `decode_pixels` does."""
    import torch

    return torch.from_numpy(decode_pixels(data)).permute(2, 0, 1)


def decode_pixels(data: bytes, memory: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode upright pixels u8 [H, W, 3] of an image that `inspect_image` has accepted, or of a raw frame.

    memory  contiguous u8 [H, W, 3], where pixels of this shape may be written; the result then is this array
    """
    if data.startswith(_NPY):
        return _decode_raw(data)
    if data.startswith(_JPEG) and not _is_rotated(data):
        pixels = _decode_jpeg(data, memory)
        if pixels is not None:
            return pixels
    with open_image(data) as image:
        return np.array(_to_rgb(image))


def _decode_raw(data: bytes) -> NDArray[np.uint8]:
    """Decode a raw frame. NumPy's own reader allocates what the header says before it looks at the rest."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    pixels = np.frombuffer(data, np.uint8, offset=file.tell())
    if dtype != np.uint8 or len(shape) != 3 or math.prod(shape) != len(pixels):
        raise ImageError(f"is a raw frame of {dtype} {list(shape)} in {len(pixels)} bytes")
    return pixels.reshape(shape).copy()


def _decode_jpeg(data: bytes, memory: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
    """Decode a JPEG bit for bit as Pillow does (tests check it), in 0.15 to 0.65 of its time (docs/decisions/store.md).

    Returns None for kinds that only Pillow decodes.
    """
    pixels: NDArray[np.uint8]
    with contextlib.suppress(ValueError):
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
        if color_space not in _COLOR_SPACES:  # CMYK would be converted in another way
            return None
        if height * width > MAX_PIXELS:  # open_image says so
            return None
        if memory is not None and memory.shape == (height, width, 3):
            simplejpeg.decode_jpeg(data, "RGB", buffer=memory)
            return memory
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    return None


def encode_frame(frame: Tensor, form: str) -> tuple[bytes, str]:
    """Encode a frame u8 [3, H, W] as `jpeg95` or `raw` (npy, u8 [H, W, 3]); return its bytes and their suffix."""
    if form == "raw":
        buffer = io.BytesIO()
        np.save(buffer, frame.permute(1, 2, 0).contiguous().numpy(), allow_pickle=False)
        return buffer.getvalue(), "npy"
    from torchvision.io import encode_jpeg

    return encode_jpeg(frame.contiguous(), quality=_JPEG_QUALITY).numpy().tobytes(), "jpg"


def _check_png(data: bytes) -> None:
    """Raise SyntaxError if a checksum is wrong; PIL's decoder would accept a truncated image."""
    with open_image(data) as image:
        image.verify()


def _is_rotated(jpeg: bytes) -> bool:
    """Return whether PIL finds an orientation other than upright, in EXIF or in XMP."""
    if not _may_have_orientation(jpeg):
        return False
    with open_image(jpeg) as image:
        return _orientation(image) in _UPRIGHT_BY


def _may_have_orientation(jpeg: bytes) -> bool:
    """Return whether an APP1 segment precedes the pixels, or the segments are not one after another."""
    at, end = 2, len(jpeg) - 3
    while at < end and jpeg[at] == 0xFF and jpeg[at + 1] != _APP1:
        if jpeg[at + 1] == _START_OF_SCAN:
            return False
        at += 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
    return b"Exif\0\0" in jpeg or b"tiff:Orientation" in jpeg


def _orientation(image: Image.Image) -> int:
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF is rotated when it is loaded
    method = _UPRIGHT_BY.get(_orientation(image))
    upright = image if method is None else image.transpose(method)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_16_bit_gray(upright).convert("RGB")
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return upright.convert("RGB")


def _from_16_bit_gray(image: Image.Image) -> Image.Image:
    """Convert 16 bits of gray to 8; Pillow itself would clip everything above 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" or low < 0 or high > np.iinfo(np.uint16).max:
        raise ImageError(
            f"its mode {image.mode} with values in [{low}, {high}] has no defined brightness; "
            "convert it to 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values / _SIXTEEN_TO_EIGHT_BITS).astype(np.uint8))
