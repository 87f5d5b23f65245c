"""Decoding of images: the pixels of PIL's upright image for every kind, and an error for damaged files."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional as tv

from permafrost.store import image_decoding
from permafrost.store.frames import decode_mask
from permafrost.store.image_decoding import (
    MAX_SCANS,
    ImageError,
    decode_part,
    decode_pixels,
    encode_frame,
    height_of_part,
    inspect_image,
)
from permafrost.store.record_form import resize_pixels
from tests.support.images import decode_rgb, png_16, png_of_stream

HEIGHT, WIDTH = 24, 33
ORIENTATION = 0x0112


def integer_noise(*shape, dtype=np.uint8, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def color_ramps(height, width):
    """Smooth color image u8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    tags[0x010F] = "maker"
    return tags


def shown_by_pil(data):
    """Upright image by PIL, u8 [3, H, W]."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def hwc(data):
    """Image by decode_rgb, as numpy [H, W, 3]."""
    return decode_rgb(data).permute(1, 2, 0).numpy()


COLOR = Image.fromarray(integer_noise(HEIGHT, WIDTH, 3))
GRAY = Image.fromarray(integer_noise(HEIGHT, WIDTH))
OPAQUE = {
    "jpeg": encoded(COLOR, "JPEG"),
    "jpeg 4:4:4": encoded(COLOR, "JPEG", subsampling=0, quality=95),
    "progressive jpeg": encoded(COLOR, "JPEG", progressive=True),
    "jpeg 4:2:2": encoded(COLOR, "JPEG", subsampling=1),
    "rgb jpeg": encoded(COLOR, "JPEG", keep_rgb=True),
    "jpeg with restarts": encoded(COLOR, "JPEG", restart_marker_blocks=2),
    "jpeg with a comment": encoded(COLOR, "JPEG", comment=b"Exif\0\0"),
    "gray jpeg": encoded(GRAY, "JPEG"),
    "cmyk jpeg": encoded(COLOR.convert("CMYK"), "JPEG"),
    "smooth jpeg": encoded(Image.fromarray(color_ramps(50, 70)), "JPEG"),
    "png": encoded(COLOR, "PNG"),
    "gray png": encoded(GRAY, "PNG"),
    "palette png": encoded(COLOR.quantize(64), "PNG"),
    "2-bit palette png": encoded(COLOR.quantize(4), "PNG"),
    "1-bit png": encoded(GRAY.convert("1"), "PNG"),
    "webp": encoded(COLOR, "WEBP"),
    "lossless webp": encoded(COLOR, "WEBP", lossless=True),
    "bmp": encoded(COLOR, "BMP"),
    "gif": encoded(COLOR.quantize(64), "GIF"),
    "ppm": encoded(COLOR, "PPM"),
    "pgm": encoded(GRAY, "PPM"),
    "tiff": encoded(COLOR, "TIFF"),
    "lzw tiff": encoded(COLOR, "TIFF", compression="tiff_lzw"),
    "1-bit tiff": encoded(GRAY.convert("1"), "TIFF"),
    "cmyk tiff": encoded(COLOR.convert("CMYK"), "TIFF"),
    "lab tiff": encoded(Image.frombytes("LAB", (WIDTH, HEIGHT), COLOR.tobytes()), "TIFF"),
}


# ---- opaque images -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPAQUE)
def test_an_opaque_image_has_pils_pixels_bit_for_bit(kind):
    data = OPAQUE[kind]
    expected = shown_by_pil(data)

    decoded = decode_rgb(data)

    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, expected)
    assert inspect_image(data)[:2] == expected.shape[1:]


@pytest.mark.parametrize("kind", OPAQUE)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_pixels_are_the_same_whatever_memory_is_offered(kind, extra):
    data = OPAQUE[kind]
    expected = decode_pixels(data)
    height, width, channels = expected.shape
    memory = np.zeros((height + extra, width, channels), np.uint8)

    decoded = decode_pixels(data, memory)

    np.testing.assert_array_equal(decoded, expected)
    if extra == 0 and "jpeg" in kind and "cmyk" not in kind:
        assert decoded is memory


LARGE = Image.fromarray(integer_noise(90, 61, 3))
SEQUENTIAL = {
    "4:2:0": encoded(LARGE, "JPEG", subsampling=2),
    "4:2:2": encoded(LARGE, "JPEG", subsampling=1),
    "4:4:4": encoded(LARGE, "JPEG", subsampling=0),
    "4:4:0": simplejpeg.encode_jpeg(np.array(LARGE), colorsubsampling="440"),
    "gray": encoded(LARGE.convert("L"), "JPEG"),
    "restarts": encoded(LARGE, "JPEG", restart_marker_blocks=3),
    "rgb": encoded(LARGE, "JPEG", keep_rgb=True),
    "comment": encoded(LARGE, "JPEG", comment=b"\xff\xc0\x00\x11\x08"),
}
OTHERS = {
    "progressive jpeg": encoded(LARGE, "JPEG", progressive=True),
    "cmyk jpeg": encoded(LARGE.convert("CMYK"), "JPEG"),
    "turned jpeg": encoded(LARGE, "JPEG", exif=exif(6)),
    "png": encoded(LARGE, "PNG"),
}


@pytest.mark.parametrize("kind", SEQUENTIAL)
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 73])
def test_upper_rows_are_those_of_the_whole_jpeg_and_the_others_are_left_out(kind, rows):
    data = SEQUENTIAL[kind]
    part = decode_part(data, (90, 61), rows)

    assert len(part) == height_of_part(rows, 90) == rows + 16
    np.testing.assert_array_equal(part[:rows], decode_pixels(data)[:rows])


@pytest.mark.parametrize("kind", OTHERS)
def test_other_images_are_decoded_whole(kind):
    np.testing.assert_array_equal(
        decode_part(OTHERS[kind], (90, 61), 20), decode_pixels(OTHERS[kind])
    )


@pytest.mark.parametrize("size", [(89, 61), (90, 60), (400, 61)])
def test_an_image_of_another_size_than_stated_is_decoded_whole(size):
    data = encoded(LARGE, "JPEG")
    np.testing.assert_array_equal(decode_part(data, size, 20), decode_pixels(data))


@pytest.mark.filterwarnings("ignore")  # PIL warns about damage that it tolerates
def test_upper_rows_of_a_damaged_jpeg_are_those_of_the_whole_one(capfd):
    generator, accepted, shortened = random.Random(0), 0, 0
    for _ in range(300):
        data = bytearray(encoded(LARGE, "JPEG"))
        for _ in range(generator.choice((1, 2, 5))):
            data[generator.randrange(generator.choice((len(data), 700)))] = generator.randrange(256)
        try:
            height, width, *_ = inspect_image(bytes(data))
        except ImageError:
            continue
        part = decode_part(bytes(data), (height, width), 20)
        np.testing.assert_array_equal(part[:20], decode_pixels(bytes(data))[:20])
        accepted += 1
        shortened += len(part) < height
    assert accepted > 100
    assert shortened > 50
    capfd.readouterr()  # drops the warnings of libjpeg


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_whatever_its_exif_orientation(kind, orientation):
    pixels = color_ramps(HEIGHT, WIDTH)
    data = encoded(Image.fromarray(pixels), kind, exif=exif(orientation), quality=95)
    straight = encoded(Image.fromarray(pixels), kind, quality=95)
    turn = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p.transpose(1, 0, 2), 2),
        8: lambda p: np.rot90(p),
    }[orientation]

    expected = turn(hwc(straight))

    np.testing.assert_array_equal(hwc(data), expected)
    assert torch.equal(decode_rgb(data), shown_by_pil(data))
    assert inspect_image(data)[:2] == expected.shape[:2]


def xmp(orientation):
    return f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()


def png_with_text(key, text):
    info = PngInfo()
    info.add_itxt(key, text)
    return encoded(COLOR, "PNG", pnginfo=info)


def png_with_late_exif():
    data, end = encoded(COLOR, "PNG", exif=exif(6)), b"\0\0\0\0IEND"
    start = data.find(b"eXIf") - 4
    length = 12 + struct.unpack(">I", data[start : start + 4])[0]
    chunk = data[start : start + length]
    return data.replace(chunk, b"").replace(end, chunk + end)


def jpeg_with_segment_before_exif(payload):
    data = encoded(COLOR, "JPEG", exif=exif(6))
    start = data.find(b"\xff\xe1")
    return data[:start] + b"\xff\xe2" + struct.pack(">H", len(payload) + 2) + payload + data[start:]


@pytest.mark.parametrize(
    "data",
    [
        encoded(COLOR, "JPEG", xmp=xmp(6)),
        jpeg_with_segment_before_exif(b"\xff\xda a thumbnail"),
        png_with_text("XML:com.adobe.xmp", xmp(6).decode()),
        png_with_late_exif(),
    ],
    ids=[
        "xmp in jpeg",
        "exif in jpeg behind another segment",
        "xmp in png",
        "exif behind the pixels of a png",
    ],
)
def test_an_orientation_in_an_odd_place_counts_for_height_and_pixels_alike(data):
    assert inspect_image(data)[:2] == (WIDTH, HEIGHT)
    assert torch.equal(decode_rgb(data), shown_by_pil(data))


def test_damaged_exif_never_gives_pixels_of_another_shape_than_was_inspected():
    data = encoded(COLOR, "JPEG", exif=exif(6))
    start, stop = data.find(b"Exif"), data.find(b"\xff\xdb")
    shapes = set()

    for at in range(start, stop):
        for value in (0, 1, 7, 255):
            damaged = data[:at] + bytes([value]) + data[at + 1 :]
            try:
                shape = inspect_image(damaged)[:2]
            except ImageError:
                continue
            shapes.add(shape)
            assert decode_rgb(damaged).shape[1:] == shape

    assert shapes == {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}


def test_a_raw_frame_comes_back_exactly():
    frame = torch.from_numpy(integer_noise(3, 20, 31))

    data, suffix = encode_frame(frame, "raw")

    assert suffix == "npy"
    assert torch.equal(decode_rgb(data), frame)
    np.testing.assert_array_equal(np.load(io.BytesIO(data)), frame.permute(1, 2, 0).numpy())


def test_a_frame_as_jpeg_stays_within_35_decibels_and_is_pils_pixels():
    frame = torch.from_numpy(color_ramps(64, 80)).permute(2, 0, 1)

    data, suffix = encode_frame(frame, "jpeg95")

    error = (decode_rgb(data).float() - frame.float()).square().mean()
    assert suffix == "jpg"
    assert 10 * torch.log10(255**2 / error) > 35
    assert torch.equal(decode_rgb(data), shown_by_pil(data))


# ---- transparency --------------------------------------------------------------------------------


def over_white(color, alpha):
    """Color over a white background: color * a + 255 * (1 - a), rounded."""
    a = alpha[..., None].astype(float) / 255
    return np.rint(color * a + 255 * (1 - a))


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
)
def test_transparent_colors_lie_on_white(kind, options):
    pixels = integer_noise(HEIGHT, WIDTH, 4)

    decoded = hwc(encoded(Image.fromarray(pixels), kind, **options))

    expected = over_white(pixels[..., :3], pixels[..., 3])
    # PIL blends in integers, so that a half may be rounded up or down.
    assert np.abs(decoded - expected).max() <= 1
    assert (decoded == expected).mean() > 0.97


def test_half_hidden_and_shown_pixels_by_hand():
    # 100 * 128/255 + 255 * 127/255 = 177.2, 0 becomes 127 and 255 stays.
    pixels = np.array([[[100, 0, 255, 128], [200, 0, 0, 0], [200, 0, 0, 255]]], dtype=np.uint8)

    decoded = hwc(encoded(Image.fromarray(pixels), "PNG"))

    assert decoded[0].tolist() == [[177, 127, 255], [255, 255, 255], [200, 0, 0]]


def test_gray_with_alpha_lies_on_white():
    pixels = integer_noise(HEIGHT, WIDTH, 2)

    decoded = hwc(encoded(Image.fromarray(pixels, "LA"), "PNG"))

    assert np.abs(decoded - over_white(pixels[..., :1], pixels[..., 1])).max() <= 1
    assert (decoded == decoded[..., :1]).all()


def palette_image():
    image = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    return image


@pytest.mark.parametrize(
    ("kind", "options", "second", "third"),
    [
        ("PNG", {}, [200, 0, 0], [0, 200, 0]),
        *((kind, {"transparency": 1}, [255] * 3, [0, 200, 0]) for kind in ("PNG", "GIF")),
        # 200 * 128/255 + 127 = 227.4
        ("PNG", {"transparency": bytes([255, 128, 0, 255])}, [227, 127, 127], [255] * 3),
    ],
)
def test_palette_entries_are_looked_up_and_transparent_ones_are_white(kind, options, second, third):
    decoded = hwc(encoded(palette_image(), kind, **options))

    assert decoded.tolist() == [[[10, 20, 30], second], [third, [0, 0, 200]]]


@pytest.mark.parametrize(
    ("mode", "key", "seen"), [("L", 7, [7, 7, 7]), ("RGB", (7, 8, 9), [7, 8, 9])]
)
def test_a_color_that_a_png_declares_transparent_is_white(mode, key, seen):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), 50 if mode == "L" else (50, 50, 50))

    decoded = hwc(encoded(image, "PNG", transparency=key))

    assert decoded[0].tolist() == [[255, 255, 255], [50, 50, 50]]
    assert hwc(encoded(image, "PNG"))[0, 0].tolist() == seen


# ---- other depths --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_gray_are_scaled_and_not_clipped(kind):
    values = integer_noise(HEIGHT, WIDTH, dtype=np.uint16, high=2**16)
    values[0, :4] = (0, 128, 129, 65535)

    decoded = hwc(encoded(Image.fromarray(values), kind))

    np.testing.assert_array_equal(decoded[..., 0], np.rint(values / 257))
    assert decoded[0, :4, 0].tolist() == [0, 0, 1, 255]
    assert (decoded == decoded[..., :1]).all()


def test_sixteen_bits_a_color_keep_their_upper_byte():
    values = integer_noise(4, 5, 3, dtype=np.uint16, high=2**16)

    decoded = hwc(png_16(values))

    # PIL reads such files as 8 bits by dropping the lower byte.
    np.testing.assert_array_equal(decoded, values >> 8)
    assert np.abs(decoded - values / 257).max() < 1


@pytest.mark.parametrize(
    "pixels", [integer_noise(4, 5).astype(np.float32), integer_noise(4, 5).astype(np.int32) - 300]
)
def test_gray_values_without_a_defined_brightness_are_refused(pixels):
    data = encoded(Image.fromarray(pixels), "TIFF")

    with pytest.raises(
        ImageError, match=r"mode [FI] with values in .* has no defined brightness; convert it"
    ):
        inspect_image(data)


# ---- damaged images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello, I am no image",
        bytes(range(256)) * 40,
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"\x93NUMPY",
    ],
)
def test_what_is_no_image_is_refused(data):
    messages = set()
    for _ in range(2):
        with pytest.raises(ImageError, match="cannot be decoded") as caught:
            inspect_image(bytes(bytearray(data)))
        messages.add(str(caught.value))

    # The manifest contains the message and must not depend on the machine.
    assert len(messages) == 1
    assert " at 0x" not in messages.pop()


@pytest.mark.parametrize("kind", OPAQUE)
def test_a_cut_image_is_refused_or_has_all_its_pixels(kind):
    """PIL requires the compressed pixels to be complete, but tolerates missing data after them."""
    data = OPAQUE[kind]
    whole = decode_rgb(data)
    refused, margin = 0, 32  # end of a deflate stream, its checksums, an end marker
    for length in {*range(0, len(data), 1 + len(data) // 200), *range(len(data) - 40, len(data))}:
        try:
            inspect_image(data[:length])
        except ImageError:
            refused += 1
        else:
            assert length >= len(data) - margin or kind.endswith("tiff")
            assert torch.equal(decode_rgb(data[:length]), whole)

    assert refused > 100


@pytest.mark.filterwarnings("ignore")  # PIL warns about damage that it tolerates
@pytest.mark.parametrize("kind", OPAQUE)
def test_damaged_bytes_are_refused_or_decode_to_what_was_inspected(kind, capfd):
    generator = random.Random(0)
    for _ in range(100):
        data = bytearray(OPAQUE[kind])
        for _ in range(generator.choice((1, 2, 5))):
            data[generator.randrange(generator.choice((len(data), 100)))] = generator.randrange(256)
        try:
            shape = inspect_image(bytes(data))[:2]
        except ImageError:
            continue
        assert decode_rgb(bytes(data)).shape[1:] == shape
    capfd.readouterr()  # drops the warnings of libjpeg


@pytest.mark.parametrize("side", [9460, 20_000, 2**31 - 1])
def test_a_header_that_claims_too_many_pixels_is_a_bomb_and_takes_no_memory(side):
    data = png_of_stream(side, side, 8, 2, zlib.compress(b"\0" * 1000))
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="decompression bomb"):
            inspect_image(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ---- the canonical frame -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(12, 12), (24, 33), (50, 20), (100, 100), (7, 64)])
def test_a_resized_frame_is_torchvisions_within_one_step(size):
    frame = torch.from_numpy(integer_noise(HEIGHT, WIDTH, 3)).permute(2, 0, 1)

    resized = torch.from_numpy(resize_pixels(frame.permute(1, 2, 0).numpy(), size)).permute(2, 0, 1)

    expected = tv.resize(frame, list(size), antialias=True)
    assert resized.dtype == torch.uint8
    assert resized.shape == (3, *size)
    assert (resized.int() - expected.int()).abs().max() <= 1


def test_a_frame_of_the_right_size_is_left_as_it_is():
    pixels = integer_noise(8, 9, 3)

    assert resize_pixels(pixels, (8, 9)) is pixels


@pytest.mark.parametrize("size", [(12, 12), (24, 33), (50, 20), (100, 100), (7, 64)])
def test_a_resized_mask_has_only_values_of_its_own(size):
    values = np.array([0, 3, 200, 255], dtype=np.uint8)
    mask = values[integer_noise(HEIGHT, WIDTH, high=4)]

    resized = decode_mask(encoded(Image.fromarray(mask), "PNG"), size)

    assert resized.shape == (1, *size)
    assert set(resized.unique().tolist()) == set(values.tolist())
    if size == mask.shape:
        np.testing.assert_array_equal(resized[0].numpy(), mask)


def test_a_doubled_mask_repeats_each_value():
    mask = integer_noise(4, 5)

    doubled = decode_mask(encoded(Image.fromarray(mask), "PNG"), (8, 10))

    np.testing.assert_array_equal(doubled[0].numpy(), mask.repeat(2, 0).repeat(2, 1))


def test_a_damaged_mask_is_an_error_and_not_the_end_of_the_process():
    data = bytearray(encoded(GRAY, "PNG"))
    data[len(data) // 2] ^= 1

    with pytest.raises((OSError, SyntaxError)):
        decode_mask(bytes(data), (HEIGHT, WIDTH))


# ---- scans of a JPEG -------------------------------------------------------------------------------


def progressive_jpeg():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG", progressive=True)
    return buffer.getvalue()


def with_scans(number):
    """A progressive JPEG whose last scan comes again until there are so many."""
    data = progressive_jpeg()
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    more = number - data.count(b"\xff\xda")
    return data[:end] + more * data[start:end] + data[end:]


@pytest.mark.parametrize("decode", [inspect_image, decode_pixels])
def test_a_jpeg_has_as_many_scans_as_are_stated_and_no_more(decode):
    decode(with_scans(MAX_SCANS))
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(with_scans(MAX_SCANS + 1))


def test_numbers_as_text_are_read_up_to_a_size(monkeypatch):
    data = b"P3 2 1 255 1 2 3 4 5 6"
    monkeypatch.setattr(image_decoding, "MAX_TEXT_BYTES", len(data))
    np.testing.assert_array_equal(decode_pixels(data), [[[1, 2, 3], [4, 5, 6]]])
    with pytest.raises(ImageError, match="bytes of numbers as text"):
        inspect_image(data + b"\n")


def test_what_looks_like_scans_in_other_parts_of_a_jpeg_is_none():
    data, marks = progressive_jpeg(), b"\xff\xda" * (MAX_SCANS + 1)
    segment = b"\xff\xe1" + (len(marks) + 2).to_bytes(2, "big") + marks  # as of a thumbnail
    for other in (data[:2] + segment + data[2:], data + marks, data[:2] + b"\xff" * 9 + data[2:]):
        assert inspect_image(other)[:2] == (24, 24)
        np.testing.assert_array_equal(decode_pixels(other), decode_pixels(data))
