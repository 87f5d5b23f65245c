"""Facts in headers, images of 16 bits, and regions that turn with their image."""

import io

import numpy as np
import pytest
from PIL import Image, features

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.core.errors import ConfigError
from permafrost.loading.dataset import StoreDataset
from permafrost.storage.files import file_at
from permafrost.store import image_decoding
from permafrost.store.image_decoding import (
    STORED_FROM_UPRIGHT,
    ImageError,
    decode_pixels,
    inspect_image,
    orientation_of,
    picture_suffix,
    read_facts,
    to_8_bits,
    turn_box,
    turn_mask,
)
from permafrost.store.reader import Store
from tests.support.images import png_16
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def encoded(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_facts_are_those_of_the_upright_image(kind, orientation):
    turned = {"exif": with_orientation(orientation)}
    if kind == "TIFF":
        turned = {"tiffinfo": {274: orientation}}
    data = encoded(np.zeros((6, 10, 3), np.uint8), kind, **turned)
    facts = read_facts(data)

    assert (facts.height, facts.width) == inspect_image(data)[:2] == decode_pixels(data).shape[:2]
    assert facts.is_turned == (orientation > 1)
    assert (facts.format, facts.bits, facts.channels, facts.largest) == (kind, 8, "color", None)


@pytest.mark.parametrize(
    ("pixels", "channels", "has_alpha"),
    [
        (np.zeros((4, 4), np.uint8), "gray", False),
        (np.zeros((4, 4, 2), np.uint8), "gray", True),
        (np.zeros((4, 4, 4), np.uint8), "color", True),
    ],
)
def test_facts_tell_gray_and_alpha(pixels, channels, has_alpha):
    facts = read_facts(encoded(pixels))

    assert (facts.channels, facts.has_alpha) == (channels, has_alpha)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("limits", [(0, 4095), (0, 65535), (100, 1000)])
def test_16_bits_are_scaled_linearly_to_8(channels, limits):
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, channels))
    data = png_16(values)
    black, white = limits
    colors = values[..., : channels - 1] if channels in (2, 4) else values
    expected = np.rint(np.clip((colors - black) * 255 / (white - black), 0, 255))

    facts = read_facts(data)
    pixels = np.asarray(Image.open(io.BytesIO(to_8_bits(data, black, white)))).reshape(values.shape)

    assert (facts.bits, facts.largest) == (16, colors.max())
    assert facts.channels == ("gray" if channels <= 2 else "color")
    np.testing.assert_array_equal(pixels[..., : colors.shape[-1]], expected)
    if channels in (2, 4):
        np.testing.assert_array_equal(pixels[..., -1], np.rint(values[..., -1] / 257))


def test_16_bits_of_a_tiff_are_scaled_and_turned(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (5, 7)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={274: 6})
    data = (tmp_path / "a.tif").read_bytes()

    pixels = np.asarray(Image.open(io.BytesIO(to_8_bits(data, 0, 4095))))

    assert read_facts(data).largest == values.max()
    np.testing.assert_array_equal(pixels, np.rint(np.rot90(values, -1) / 4095 * 255))


def test_8_bits_are_left_as_they_are():
    assert to_8_bits(encoded(np.zeros((4, 4, 3), np.uint8)), 0, 4095) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_matrix_of_an_orientation_turns_as_a_box_does(orientation):
    """A corner of the upright image is where the box of the stored pixels was."""
    height, width = (30, 50) if orientation < 5 else (50, 30)
    box = turn_box((6, 4, 20, 10), orientation, height, width)
    corners = np.array([[box[0], box[1]], [box[2], box[3]]]) / (width, height) * 2 - 1

    stored = (corners @ np.array(STORED_FROM_UPRIGHT[orientation]).T + 1) / 2 * (50, 30)

    np.testing.assert_allclose(np.sort(stored, axis=0), [[6, 4], [20, 10]], atol=1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_and_a_mask_turn_as_the_pixels_do(orientation):
    stored = np.zeros((30, 50, 3), np.uint8)
    stored[4:10, 6:20] = 255
    data = encoded(stored, exif=with_orientation(orientation))
    upright = decode_pixels(data)[..., 0]
    rows, columns = np.nonzero(upright)

    box = turn_box((6, 4, 20, 10), orientation_of(data), *upright.shape)

    assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    if orientation > 1:
        mask = turn_mask(encoded(stored[..., 0]), orientation)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(mask))), upright)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("WEBP", "webp"),
        ("TIFF", "tif"),
        ("PPM", "ppm"),
    ],
)
def test_a_format_is_told_by_its_first_bytes(kind, suffix):
    assert picture_suffix(encoded(np.zeros((4, 4, 3), np.uint8), kind)[:16]) == suffix
    assert picture_suffix(b"<html></html>...") is None


def test_heic_needs_its_decoder_and_says_so(monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    monkeypatch.setattr(image_decoding, "decodes_heif", lambda: False)

    with pytest.raises(ImageError, match="pip install pillow-heif"):
        inspect_image(heic)


@pytest.mark.parametrize(
    ("kind", "suffix", "tolerance"), [("AVIF", "avif", 3), ("HEIF", "heic", 5)]
)
def test_formats_of_optional_decoders_are_decoded(kind, suffix, tolerance):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(np.full((64, 64, 3), 200, np.uint8), kind, quality=95)

    assert picture_suffix(data[:16]) == suffix
    assert inspect_image(data)[:2] == (64, 64)
    assert np.abs(decode_pixels(data).astype(int) - 200).max() <= tolerance


# ---- packing -------------------------------------------------------------------------------------


def packed(tmp_path, data):
    precompute.run(precompute_config(tmp_path / "store", data=data))
    return Store(tmp_path / "store")


def images_in(store):
    """Bytes of each image of a store by key."""
    rows = np.arange(store.index.num_rows)
    columns = store.index.take(("offset", "size"), rows)
    (shard,) = store.shards
    tar = shard.file(store.folder.absolute())
    data = file_at(tar).read()
    return {
        key: data[offset : offset + size]
        for key, offset, size in zip(
            store.index.keys(rows),
            columns["offset"].tolist(),
            columns["size"].tolist(),
            strict=True,
        )
    }


def test_a_bit_range_packs_8_bits_and_is_part_of_the_data(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 1))
    folder = tmp_path / "set/cat"
    folder.mkdir(parents=True)
    (folder / "deep.png").write_bytes(png_16(values))
    (folder / "plain.png").write_bytes(encoded(np.full((8, 8, 3), 7, np.uint8)))
    ranged = ImageFolderDataConfig(path=str(tmp_path / "set"), bit_range=(0, 4095))
    plain = ImageFolderDataConfig(path=str(tmp_path / "set"), accept=("dark_images",))

    store = packed(tmp_path, ranged)

    images = images_in(store)
    pixels = decode_pixels(images["cat%2Fdeep%2Epng"])
    np.testing.assert_array_equal(pixels, np.rint(values / 4095 * 255).repeat(3, axis=2))
    assert images["cat%2Fplain%2Epng"] == (folder / "plain.png").read_bytes()
    assert ranged.description["bit_range"] == (0, 4095)
    assert "bit_range" not in plain.description  # stores without it keep their fingerprints


@pytest.mark.parametrize("limits", [(1,), (5, 5), (9, 2), (-1, 5), (0, 65536), (1, 2, 3)])
def test_a_bit_range_that_is_none_is_refused(tmp_path, limits):
    with pytest.raises(ConfigError, match=r"data\.bit_range=.*black below white"):
        ImageFolderDataConfig(path=str(tmp_path), bit_range=limits)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_boxes_and_masks_of_stored_pixels_are_where_the_object_is(tmp_path, orientation):
    stored = np.zeros((30, 50, 3), np.uint8)
    stored[4:10, 6:20] = 255
    (tmp_path / "a.png").write_bytes(encoded(stored, exif=with_orientation(orientation)))
    (tmp_path / "m.png").write_bytes(encoded(stored[..., 0]))
    boxes = '"[{""x0"": 6, ""y0"": 4, ""x1"": 20, ""y1"": 10}]"'
    (tmp_path / "t.csv").write_text(f"path,label,boxes,mask\na.png,cat,{boxes},m.png\n")
    data = ImageTableDataConfig(
        path=str(tmp_path / "t.csv"), boxes="boxes", mask="mask", boxes_of="stored"
    )

    batch = StoreDataset(packed(tmp_path, data), range(1), with_regions=True).__getitems__([0])

    height, width = batch.inputs.shape[-2:]
    bright = batch.inputs[0].float().mean(0) > 127
    _, x0, y0, x1, y1 = batch.boxes[0][0].tolist()
    rows, columns = bright.nonzero().T
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    sides = (width, height, width, height)
    boxed = [(v + 1) / 2 * side for v, side in zip((x0, y0, x1, y1), sides, strict=True)]
    assert np.abs(np.array(corners) - boxed).max() <= 1
    mask = batch.masks[0, 0] > 0
    assert (mask == bright).float().mean() > 0.98
