"""Generated pictures of every mode, depth, palette, transparency, size and orientation, against Pillow and torchvision.

The reference is read by a few lines of Pillow here: upright by EXIF and on white; gray of 16 bits is scaled by hand.
"""

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_image

from permafrost.config.data import ImageFolderDataConfig
from permafrost.sources.source import build_source
from permafrost.store.image_decoding import decode_pixels, read_facts, read_pixels
from tests.support.images import png_16
from tests.support.previews import levels_of, preview_of

MODES = {
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "RGB;16", "RGBA;16"],
    "WEBP": ["RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "RGB", "RGBA", "I;16"],
    "BMP": ["1", "L", "P", "RGB"],
    "GIF": ["L", "P"],
}
KINDS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif"}
TURNED = ("JPEG", "PNG", "WEBP", "TIFF")
"""Formats in which an orientation is written here."""


@st.composite
def pictures(draw):
    kind, mode = draw(st.sampled_from(KINDS))
    return {
        "kind": kind,
        "mode": mode,
        "size": (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        "orientation": draw(st.integers(1, 8)) if kind in TURNED and ";" not in mode else 1,
        "values": draw(st.sampled_from(["noise", "smooth", "one"])),
        "seed": draw(st.integers(0, 2**16)),
    }


def values_of(picture, channels, most):
    """Values [H, W, channels] of a picture, up to `most`."""
    width, height = picture["size"]
    random = np.random.default_rng(picture["seed"])
    if picture["values"] == "noise":
        return random.integers(0, most + 1, (height, width, channels))
    if picture["values"] == "one":
        return np.broadcast_to(random.integers(0, most + 1, channels), (height, width, channels))
    ramp = np.linspace(0, 1, height)[:, None] * np.linspace(0.2, 1, width)[None]
    return np.rint(ramp[:, :, None] * random.integers(1, most + 1, channels)).astype(np.int64)


def write(picture):
    """Return the file of a picture, and its values u8 [H, W, 3] before it is turned and compressed."""
    kind, mode = picture["kind"], picture["mode"]
    if mode in ("RGB;16", "RGBA;16"):
        return png_16(values_of(picture, len(mode) - 3, 65_535)), None
    if mode == "I;16":
        values = values_of(picture, 1, 65_535)[..., 0]
        image = Image.fromarray(values.astype(np.uint16))
        data = saved(image, kind, picture)
        return data, np.rint(np.stack([values] * 3, -1) * 255 / 65_535)
    channels = {"1": 1, "L": 1, "LA": 2, "P": 1, "PA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = values_of(picture, channels, 255).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(values[..., 0], "P")
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tolist())
    elif mode == "PA":
        image = Image.fromarray(values[..., 0], "P")
        image.putpalette(np.random.default_rng(2).integers(0, 256, 768).astype(np.uint8).tolist())
        image.info["transparency"] = bytes(range(256))
    elif mode == "1":
        image = Image.fromarray(values[..., 0]).convert("1")
    else:
        image = Image.fromarray(values[..., 0] if channels == 1 else values, mode)
    options = {"transparency": bytes(range(256))} if mode == "PA" else {}
    return saved(image, kind, picture, **options), None


def saved(image, kind, picture, **options):
    turned = picture["orientation"]
    if kind in TURNED and turned > 1:
        exif = Image.Exif()
        exif[274] = turned
        options |= {"tiffinfo": {274: turned}} if kind == "TIFF" else {"exif": exif}
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read_by_pillow(data):
    """Pixels u8 [H, W, 3] of an image of 8 bits, read by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        turned = ImageOps.exif_transpose(image)
    if turned.mode in ("LA", "PA", "RGBA") or "transparency" in turned.info:
        turned = turned.convert("RGBA")
        white = Image.new("RGBA", turned.size, (255, 255, 255, 255))
        turned = Image.alpha_composite(white, turned)
    return np.asarray(turned.convert("RGB")).astype(np.float64)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(picture=pictures())
@example(
    picture={
        "kind": "PNG",
        "mode": "RGB",
        "size": (7, 5),
        "orientation": 6,
        "values": "noise",
        "seed": 1,
    }
)
@example(
    picture={
        "kind": "PNG",
        "mode": "PA",
        "size": (9, 4),
        "orientation": 1,
        "values": "noise",
        "seed": 2,
    }
)
def test_a_picture_has_the_pixels_of_pillow_and_torchvision(picture):
    data, expected = write(picture)
    if expected is None:
        expected = read_by_pillow(data)

    pixels = decode_pixels(data).astype(np.float64)
    facts, looked_at = read_facts(data), read_pixels(data, 256)

    assert pixels.shape == expected.shape == (facts.height, facts.width, 3)
    assert np.abs(pixels - expected).max() <= 1
    assert facts.bits == (16 if ";16" in picture["mode"] else 8)
    assert (looked_at.smallest == looked_at.largest) == (pixels.min() == pixels.max())
    if picture["kind"] in ("JPEG", "PNG") and picture["mode"] in ("1", "L", "P", "RGB"):
        theirs = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8),
            ImageReadMode.RGB,
            apply_exif_orientation=True,
        )
        assert np.abs(pixels - theirs.permute(1, 2, 0).numpy()).max() <= 3 * (
            picture["kind"] == "JPEG"
        )


@pytest.mark.parametrize("kind", SUFFIXES)
def test_pictures_of_a_folder_are_read_as_written_and_have_no_finding(tmp_path, kind):
    """Noise of each mode in each class, so that nothing but the subject tells them apart."""
    written = {}
    for label in ("cat", "dog"):
        for number in range(12):
            mode = MODES[kind][number % len(MODES[kind])]
            picture = {
                **{"kind": kind, "mode": mode, "size": (20 + number, 16), "orientation": 1},
                **{"values": "noise", "seed": number + 100 * (label == "dog")},
            }
            path = tmp_path / label / f"{number}.{SUFFIXES[kind]}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(write(picture)[0])
            written[f"{label}/{path.name}"] = path.read_bytes()
    data = ImageFolderDataConfig(path=str(tmp_path))

    levels = levels_of(preview_of(data))
    source = build_source(data)

    is_translucent = not {"LA", "PA", "RGBA", "RGBA;16"}.isdisjoint(MODES[kind])
    assert (levels.pop("dropped_channels", None) == "warning") == is_translucent  # by noise
    assert set(levels.values()) <= {"note"}, levels
    assert {record.content[0]: source.read(record).image for record in source.records()} == written
