"""Decoding of image files of any supported kind to upright RGB pixels, and encoding of re-encoded frames.

Grayscale is repeated, CMYK converted, a palette looked up, 16 bits scaled to 8, and transparency blended onto white.
The EXIF orientation is applied to pixels here and only here. HEIC is decoded if the package pillow-heif is installed.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray

# Pillow opens a format requested by name only if its plugin has been imported.
from PIL import (  # noqa: F401
    AvifImagePlugin,
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

from permafrost.core.errors import RecordError, require
from permafrost.store.codecs import encode_npy

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image, a quarter of a GiB as RGB. Larger files are treated as decompression
bombs."""
MAX_IMAGE_BYTES = 3 * MAX_PIXELS + 2**12
"""Maximum size of an image file: the largest image without compression."""

_TOO_MANY_PIXELS = (
    f"it claims more than {MAX_PIXELS:,} pixels: a decompression bomb, or an image to make smaller"
)
MAX_SCANS = 100
"""Largest number of scans of a JPEG, each of which takes as long as a whole image. Encoders write about ten."""
MAX_TEXT_BYTES = 2**24
"""Largest size of a file whose pixels are numbers as text (PPM), which take a quarter of a second a megabyte."""
_JPEG = b"\xff\xd8\xff"
_NUMBERS_AS_TEXT = (b"P1", b"P2", b"P3")
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_SEQUENTIAL = (0xC0, 0xC1)
"""Second bytes of the headers of frames whose rows follow one another."""
_ROWS_BELOW = 16
"""Rows of a JPEG that are decoded below those that are needed, whose colors their upsampling reads."""
_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD9))
"""Second bytes that do not start a segment: a stuffed FF, and markers that stand alone."""
_COLOR_SPACES = ("YCbCr", "Gray", "RGB")
_NPY = b"\x93NUMPY"
THUMBNAIL_SIDE = 16
"""Side of a thumbnail in pixels."""
_THUMBNAIL_PIXELS = 160
_SIXTEEN_TO_EIGHT_BITS = 257
_JPEG_QUALITY = 95
_END_BYTES = 64
"""Bytes at the end of a file among which its end mark is; others are examined more closely."""
_PNG_DEPTH = 24
"""Position of the bits of a channel in a PNG."""
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type", b"adobe.xmp")
"""Beginnings of what may hold the orientation of a PNG."""
_WHITE_16 = 65_535
_TIFF_PHOTOMETRIC = 262
"""Tag of a TIFF that says whether 0 is white (0) or black (1)."""
_TIFF_SAMPLES = 277
"""Tag of the number of channels of a TIFF."""
_TIFF_DEPTH = 258
"""Tag of the bits of each channel of a TIFF."""
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
STORED_FROM_UPRIGHT = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, 1), (-1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, -1), (1, 0)),
}
"""EXIF orientation -> matrix from (x, y) in [-1, 1] of the upright image to the stored pixels."""


FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF")
"""Formats of Pillow that are accepted, independent of the file's name. Others are excluded on purpose: some
start programs (an EPS is passed to Ghostscript), and many have rarely tested parsers."""


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SIGNATURES = (
    (_JPEG, "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"BM", "bmp"),
    (b"P5", "pgm"),
    (b"P6", "ppm"),
)


class ImageError(RecordError):
    """Image that cannot be decoded."""


def picture_suffix(head: bytes) -> str | None:
    """Return the suffix of the format that a file's first 16 bytes announce, None if it is unknown."""
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis"):
            return "avif"
        return "heic" if head[8:12] in _HEIF_BRANDS else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return next((suffix for start, suffix in _SIGNATURES if head.startswith(start)), None)


@cache
def decodes_heif() -> bool:
    """Return whether the package pillow-heif is installed, and let Pillow use it."""
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def open_image(data: bytes) -> Image.Image:
    """Open the image in these bytes, of one of FORMATS, without decoding it.

    Raises:
        ImageError: If it is too large to decode, or is HEIC and the decoder is not installed.
        UnidentifiedImageError: If it is of no known format.
    """
    formats: tuple[str, ...] = FORMATS
    if picture_suffix(data[:16]) == "heic":
        require(
            decodes_heif(), "it is HEIC, which needs a decoder: pip install pillow-heif", ImageError
        )
        formats = ("HEIF",)
    if data.startswith(_JPEG):
        _require_few_scans(data)
    require(
        not data.startswith(_NUMBERS_AS_TEXT) or len(data) <= MAX_TEXT_BYTES,
        f"it has {len(data):,} bytes of numbers as text, more than {MAX_TEXT_BYTES:,}; save it as PNG",
        ImageError,
    )
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(_TOO_MANY_PIXELS) from error
    width, height = image.size
    require(
        width * height <= MAX_PIXELS, f"{width}x{height} pixels: {_TOO_MANY_PIXELS}", ImageError
    )
    return image


def _require_few_scans(data: bytes) -> None:
    """Raise ImageError if a JPEG has so many scans that decoding it would take minutes."""
    values = np.frombuffer(data, np.uint8)  # a tenth of the time of bytes.count
    starts = (values[:-1] == 0xFF) & (values[1:] == _START_OF_SCAN)
    require(
        int(np.count_nonzero(starts)) <= MAX_SCANS or _count_scans(data) <= MAX_SCANS,
        f"it has more than {MAX_SCANS} scans, each of which takes as long as a whole image; save it again",
        ImageError,
    )


def _count_scans(data: bytes) -> int:
    """Count the scans of a JPEG, without those of a thumbnail or of what follows its end."""
    scans, position = 0, data.find(b"\xff", 2)
    while 0 <= position < len(data) - 1:
        if (marker := data[position + 1]) == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        has_length = marker not in _WITHOUT_LENGTH
        length = int.from_bytes(data[position + 2 : position + 4], "big") if has_length else 0
        position = data.find(b"\xff", position + 2 + length)
    return scans


class UprightImage(NamedTuple):
    """Size of an image that decodes, how its pixels were turned for it, and a thumbnail."""

    height: int
    """Height of the upright image in pixels, `width` likewise."""
    width: int
    orientation: int
    """EXIF orientation of the pixels as Pillow decodes them, 1 for upright ones. Pillow itself turns a TIFF, so the
    pixels of one are upright."""
    thumbnail: bytes
    """Means of the upright image in gray on a grid of 16x16, whatever its proportions, u8 [256]."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Raise ImageError for what Pillow raises in the block."""
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except UnidentifiedImageError:  # its text has a memory address, and manifests contain reasons
        raise ImageError("cannot be decoded: not an image of a known kind") from None
    except Exception as error:  # Pillow's parsers raise many types of exceptions
        raise ImageError(f"cannot be decoded: {error or type(error).__name__}") from error


def inspect_image(data: bytes) -> UprightImage:
    """Decode an image to its last byte, and return its upright size and its thumbnail.

    Raises:
        ImageError: If it does not decode.
    """
    with _decoding():
        # The check of open_image is stricter than Pillow's.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = open_image(data)
        with image:
            upright = _to_rgb(image)
            orientation = _orientation(image)
            if image.format == "PNG":
                with open_image(data) as png:  # PIL's decoder would accept a truncated one
                    png.verify()
            thumbnail = thumbnail_of(upright)
    return UprightImage(upright.height, upright.width, orientation, thumbnail)


def thumbnail_of(image: Image.Image) -> bytes:
    """Return the means of an image in gray on a grid of 16x16, u8 [256]; their mean is its brightness.

    Of a larger image, 160x160 pixels are read, which takes half the time.
    """
    if min(image.size) > _THUMBNAIL_PIXELS:
        image = image.resize((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.NEAREST)
    gray, factor = image.convert("L"), image.width // THUMBNAIL_SIDE
    if image.width == image.height == factor * THUMBNAIL_SIDE:  # the same means, sooner
        return gray.reduce(factor).tobytes()
    return gray.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


def decode_pixels(data: bytes, memory: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode upright pixels u8 [H, W, 3] of an image that `inspect_image` has accepted, or of a raw frame.

    Args:
        data: Bytes of the image.
        memory: Contiguous u8 [H, W, 3], where pixels of this shape may be written; the result then is this array.

    Raises:
        ImageError: If a raw frame has another number of bytes than its shape says.
    """
    if data.startswith(_NPY):
        return _decode_raw(data)
    is_upright_jpeg = data.startswith(_JPEG) and not _is_rotated(data)
    if is_upright_jpeg and (pixels := _decode_jpeg(data, memory)) is not None:
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
    """Decode a JPEG bit for bit as Pillow does (tests check it), in 0.15 to 0.65 of its time.

    Return None for kinds that only Pillow decodes.
    """
    _require_few_scans(data)
    with contextlib.suppress(ValueError):
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
        # CMYK would be converted in another way, and open_image says of one that is too large that it is.
        if color_space not in _COLOR_SPACES or height * width > MAX_PIXELS:
            return None
        if memory is not None and memory.shape == (height, width, 3):
            simplejpeg.decode_jpeg(data, "RGB", buffer=memory)
            return memory
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    return None


def decode_part(
    data: bytes, size: tuple[int, int], rows: int, divisor: int = 1
) -> NDArray[np.uint8]:
    """Decode the upper rows of an upright image, the same pixels as those of `decode_pixels`: u8 [h, w, 3].

    A decoder ends at the height that a JPEG states, so a lower one leaves the rest of the file undecoded.

    Args:
        data: Bytes of the image.
        size: (height, width) that the image has in the index.
        rows: Number of rows that are needed, of which h is `height_of_part` where a JPEG has one sequential scan, and
            the height of the image in other files.
        divisor: 2, 4 or 8 to decode such a JPEG to this part of its height and width, rounded up, of fewer frequencies.

    Raises:
        ImageError: As `decode_pixels`.
    """
    height = height_of_part(rows, size[0])
    if (divisor > 1 or height < size[0]) and data.startswith(_JPEG) and not _is_rotated(data):
        place = _place_of_size(data, size)
        if place:
            shorter = data[:place] + height.to_bytes(2, "big") + data[place + 2 :]
            smallest = {"min_height": -(-height // divisor), "min_width": -(-size[1] // divisor)}
            with contextlib.suppress(ValueError):
                # Strictly, the bytes of the rows below are surplus.
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                    shorter, "RGB", strict=False, **(smallest if divisor > 1 else {})
                )
                return pixels
    return decode_pixels(data)


def height_of_part(rows: int, height: int) -> int:
    """Return the number of rows that are decoded for a number of upper ones of an image of this height."""
    return min(rows + _ROWS_BELOW, height)


def _place_of_size(jpeg: bytes, size: tuple[int, int]) -> int:
    """Return the place of the height in a JPEG of one sequential scan; 0 in others, and if its size is another."""
    at, place, end = 2, 0, len(jpeg) - 10
    while at < end and jpeg[at] == 0xFF:
        if (kind := jpeg[at + 1]) in _SEQUENTIAL:
            place, components = at + 5, jpeg[at + 9]
        elif kind == _START_OF_SCAN:
            is_whole = place and components in (1, 3) and jpeg[at + 4] == components
            stated = place and struct.unpack_from(">HH", jpeg, place)
            return place if is_whole and stated == size else 0
        at += 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
    return 0


class PictureFacts(NamedTuple):
    """Facts about the pixels that a store has of an image."""

    smallest: int
    """Smallest value of any channel, after transparency was blended onto white; `largest` and `mean` likewise."""
    largest: int
    mean: float
    thumbnail: bytes
    """As that of UprightImage, of a JPEG from a reduced image."""
    translucent: float
    """Fraction of pixels that are neither transparent nor opaque."""


def read_pixels(data: bytes, side: int) -> PictureFacts:
    """Look at the pixels of an image that `read_facts` has accepted.

    Args:
        data: Bytes of its file.
        side: Minimum side in pixels when decoding a JPEG at a fraction of its size.

    Raises:
        ImageError: If it cannot be decoded.
    """
    with _decoding(), open_image(data) as image:
        image.draft("RGB", (side, side))
        upright = _to_rgb(image)
        pixels, thumbnail = np.asarray(upright), thumbnail_of(upright)
        alpha = np.asarray(
            image.convert("RGBA").getchannel("A") if image.has_transparency_data else 255
        )
    return PictureFacts(
        smallest=int(pixels.min()),
        largest=int(pixels.max()),
        mean=float(pixels.mean()),
        thumbnail=thumbnail,
        translucent=float(((alpha > 0) & (alpha < 255)).mean()),
    )


def largest_value(mask: bytes) -> int:
    """Return the largest value of a mask, of a palette its largest index."""
    with open_image(mask) as image:
        return int(np.asarray(image if image.mode == "P" else image.convert("L")).max())


def encode_frame(frame: Tensor, form: str) -> tuple[bytes, str]:
    """Encode a frame.

    Args:
        frame: u8 [3, H, W].
        form: `jpeg95`, or `raw` (npy, u8 [H, W, 3]).

    Returns:
        The bytes, and the suffix of their file name without a dot.
    """
    if form == "raw":
        return encode_npy(frame.permute(1, 2, 0).contiguous().numpy()), "npy"
    from torchvision.io import encode_jpeg

    return encode_jpeg(frame.contiguous(), quality=_JPEG_QUALITY).numpy().tobytes(), "jpg"


def png_of(image: Image.Image) -> bytes:
    """Return the PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


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
    """Return the EXIF orientation, 1 for an image that is upright or has no known one."""
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in _UPRIGHT_BY else 1


# ---- what a file is --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Facts in the header of an image file, and the range of values of one with 16 bits."""

    format: str
    height: int
    """Height of the upright image in pixels, `width` likewise."""
    width: int
    bits: int
    """Bits of a channel: 8 or 16 (fewer count as 8)."""
    channels: Literal["gray", "color", "palette", "CMYK"]
    has_alpha: bool
    orientation: int
    """EXIF orientation, 1 for an upright file."""
    bands: int = 0
    """Number of channels of a TIFF, of which Pillow may read the first ones only; 0 for other formats."""
    is_animated: bool = False
    """True if the file has several pictures, of which the first one is read."""
    largest: int | None = None
    """Largest value of a 16-bit file, without alpha; rounded up for kinds whose high bytes alone are read."""

    @property
    def is_turned(self) -> bool:
        """True if the file's pixels are not upright."""
        return self.orientation in _UPRIGHT_BY


def read_facts(data: bytes) -> ImageFacts:
    """Read what an image file says of itself; only a file with 16 bits, or without its end, is decoded.

    Raises:
        ImageError: If the header cannot be read, or the file was cut.
    """
    with _decoding(), open_image(data) as image:
        # Of a PNG without such a chunk, Pillow would decode the pixels to look behind them.
        may_turn = image.format != "PNG" or any(mark in data for mark in _PNG_ORIENTATION)
        orientation = _orientation(image) if may_turn else 1
        bits = _bits_of(image, data)
        has_other_values = image.mode == "F" or (image.mode.startswith("I") and bits != 16)
        if has_other_values or not _ends_whole(image.format, data):
            inspect_image(data)
        facts = ImageFacts(
            format=image.format or "",
            height=image.height,
            width=image.width,
            bits=bits,
            channels=_channels_of(image, data),
            has_alpha=image.has_transparency_data,
            orientation=orientation,
            bands=int(cast("Any", image).tag_v2.get(_TIFF_SAMPLES, 1))
            if image.format == "TIFF"
            else 0,
            is_animated=bool(getattr(image, "is_animated", False)),
        )
        if facts.orientation >= 5 and image.format != "TIFF":  # whose size Pillow gives upright
            facts = replace(facts, height=image.width, width=image.height)
        return facts if bits == 8 else replace(facts, largest=_largest_of(image, data))


def _ends_whole(form: str | None, data: bytes) -> bool:
    """Return whether a file has the mark at its end that its format requires; True for formats without one."""
    end = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(form or "")
    return end is None or end in data[-_END_BYTES:]


def _bits_of(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG":
        return 16 if len(data) > _PNG_DEPTH and data[_PNG_DEPTH] == 16 else 8
    if image.format == "TIFF":
        return 16 if max(cast("Any", image).tag_v2.get(_TIFF_DEPTH, (8,))) == 16 else 8
    return 16 if image.mode.startswith("I") else 8


def _channels_of(image: Image.Image, data: bytes) -> Literal["gray", "color", "palette", "CMYK"]:
    if image.format == "PNG":  # Pillow opens 16 bits of gray and alpha as RGBA
        return {0: "gray", 4: "gray", 3: "palette"}.get(data[_PNG_DEPTH + 1], "color")  # type: ignore[return-value]
    if image.mode in ("P", "PA"):
        return "palette"
    if image.mode == "CMYK":
        return "CMYK"
    return "gray" if image.mode[:1] in ("1", "L", "I", "F") else "color"


def _largest_of(image: Image.Image, data: bytes) -> int:
    """Return the largest value, without alpha."""
    try:
        values = _values_of(image, data)
    except (ImageError, RuntimeError):  # of some files only the high bytes are read
        return 256 * int(np.asarray(image.convert("RGB")).max()) + 255
    return int((values[..., :-1] if values.shape[-1] in (2, 4) else values).max())


def _values_of(image: Image.Image, data: bytes) -> NDArray[Any]:
    """Return the values [H, W, C] of an image with 16 bits, upright as the file has it, with its alpha last.

    Raises:
        ImageError: If it is of a kind of which Pillow reads the high bytes only.
    """
    if image.format == "PNG":
        import torch
        from torchvision.io import ImageReadMode, decode_png

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = decode_png(encoded, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
        return cast("NDArray[Any]", values)
    require(
        image.mode.startswith("I"),
        f"it is a {image.format} of 16 bits and several channels, of which only 8 bits are read; convert it to PNG",
        ImageError,
    )
    values = np.asarray(image)
    return (_WHITE_16 - values if _begins_white(image) else values)[..., None]


def _begins_white(image: Image.Image) -> bool:
    """Return whether 0 is white in a TIFF; Pillow inverts such values of 8 bits only."""
    return image.format == "TIFF" and cast("Any", image).tag_v2.get(_TIFF_PHOTOMETRIC, 1) == 0


def to_8_bits(data: bytes, black: int, white: int) -> bytes | None:
    """Convert an image file of 16 bits to an upright PNG of 8, or return None for a file of 8 bits.

    Values are scaled linearly and clipped; an alpha channel always has its full range.

    Args:
        data: Image file.
        black: Value that becomes 0.
        white: Value that becomes 255.

    Raises:
        ImageError: If the file cannot be decoded, or has several channels in a format other than PNG.
    """
    inspect_image(data)
    with open_image(data) as image:
        if _bits_of(image, data) == 8:
            return None
        orientation = 1 if image.format == "TIFF" else _orientation(image)
        image.load()  # a TIFF is rotated when it is loaded
        try:
            values = _values_of(image, data)
        except RuntimeError as error:  # torchvision refuses some files that Pillow reads
            raise ImageError(f"its 16 bits cannot be decoded: {error}") from error
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ImageError(f"its values in [{values.min()}, {values.max()}] are not those of 16 bits")
    every = np.arange(2**16)
    table = np.rint(np.clip((every - black) * (255 / (white - black)), 0, 255)).astype(np.uint8)
    eight = table[values]
    if values.shape[-1] in (2, 4):
        eight[..., -1] = np.rint(every / _SIXTEEN_TO_EIGHT_BITS).astype(np.uint8)[values[..., -1]]
    pixels = Image.fromarray(eight[..., 0] if eight.shape[-1] == 1 else eight)
    method = _UPRIGHT_BY.get(orientation)
    return png_of(pixels if method is None else pixels.transpose(method))


def orientation_of(data: bytes) -> int:
    """Return the EXIF orientation of an image file, 1 if it is upright."""
    with open_image(data) as image:
        return _orientation(image)


def turn_box(
    corners: tuple[float, float, float, float], orientation: int, height: int, width: int
) -> tuple[float, float, float, float]:
    """Move a box (x0, y0, x1, y1) of the stored pixels to the upright image, in pixels, edges included.

    Args:
        corners: Corners in the stored pixels.
        orientation: EXIF orientation of the file.
        height: Height of the upright image in pixels.
        width: Width of the upright image in pixels.
    """
    x0, y0, x1, y1 = corners
    flipped_x, flipped_y = (width - x1, width - x0), (height - y1, height - y0)
    turned_x, turned_y = (width - y1, width - y0), (height - x1, height - x0)
    (left, right), (top, bottom) = {
        2: (flipped_x, (y0, y1)),
        3: (flipped_x, flipped_y),
        4: ((x0, x1), flipped_y),
        5: ((y0, y1), (x0, x1)),
        6: (turned_x, (x0, x1)),
        7: (turned_x, turned_y),
        8: ((y0, y1), turned_y),
    }.get(orientation, ((x0, x1), (y0, y1)))
    return left, top, right, bottom


def turn_mask(mask: bytes, orientation: int) -> bytes:
    """Turn a mask of the stored pixels upright: PNG, whose values are unchanged."""
    with open_image(mask) as image:
        return png_of(image.transpose(_UPRIGHT_BY[orientation]))


# ---- decoding --------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF is rotated when it is loaded
    method = _UPRIGHT_BY.get(_orientation(image))
    upright = image if method is None else image.transpose(method)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_16_bit_gray(upright, begins_white=_begins_white(image)).convert("RGB")
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def _from_16_bit_gray(image: Image.Image, *, begins_white: bool) -> Image.Image:
    """Convert 16 bits of gray to 8; Pillow itself would clip everything above 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    require(
        image.mode != "F" and low >= 0 and high <= np.iinfo(np.uint16).max,
        f"its mode {image.mode} with values in [{low}, {high}] has no defined brightness; "
        "convert it to 8 or 16 bits",
        ImageError,
    )
    if begins_white:
        values = _WHITE_16 - values
    return Image.fromarray(np.rint(values / _SIXTEEN_TO_EIGHT_BITS).astype(np.uint8))
