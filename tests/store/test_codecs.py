"""Accuracy of max-abs storage."""

import io
import pickle

import numpy as np
import pytest

from permafrost.storage.untrusted import FormatError, parse_npy
from permafrost.store.codecs import cosines, decode_unit, encode_npy, lowest_cosine_of_arrays
from tests.support.items import for_each
from tests.support.tensors import encode_maxabs

AXES = (2, 3, 4)


def gradcams():
    values = np.random.default_rng(0).random((50, 1, 1, 7, 7))
    return np.maximum(values - 0.5, 0)


def bcos_weights():
    """Signed maps of six channels with maxima of about eight standard deviations, as in a trained network."""
    return np.random.default_rng(0).laplace(size=(50, 1, 6, 32, 32))


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 1 - 1e-12), ("float16", 0.99999), ("int8", 0.999)]
)
@pytest.mark.parametrize("maps", [gradcams, bcos_weights])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_a_round_trip_keeps_the_direction_at_any_scale(dtype, cosine, maps, scale):
    values = (maps() * scale).astype(np.float32)

    stored, scales = encode_maxabs(values, dtype, AXES)

    assert stored.dtype == dtype
    assert lowest_cosine_of_arrays(values[:, 0], stored[:, 0]) >= cosine
    np.testing.assert_allclose(scales[:, 0], np.abs(values).max(axis=AXES)[:, 0], rtol=1e-6)
    decoded = decode_unit(stored) * scales[:, :, None, None, None]
    np.testing.assert_allclose(decoded, values, atol=scales.max() / 250)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_zero_map_survives(dtype):
    stored, scales = encode_maxabs(np.zeros((2, 1, 1, 7, 7), np.float32), dtype, AXES)

    assert not stored.any()
    assert not scales.any()
    assert lowest_cosine_of_arrays(np.zeros((2, 49), np.float32), stored.reshape(2, 49)) == 1.0


def test_stored_halves_are_rounded_to_nearest_even():
    exact = np.arange(0x3C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # 0 to below 1
    ties = (exact[:-1].astype(np.float64) + exact[1:]) / 2  # between two halves, exact in float32
    values = np.concatenate([exact, ties.astype(np.float32), np.float32([1.0])])[None]

    stored, scale = encode_maxabs(values, "float16", axes=(1,))

    assert scale == 1
    assert np.array_equal(stored[0, : len(exact)].view(np.uint16), np.arange(0x3C00))
    between = stored[0, len(exact) : -1].view(np.uint16)
    lower = np.arange(len(ties))
    assert np.array_equal(between, lower + lower % 2)


def test_signs_survive():
    values = np.array([[[[[-2.0, 1.0]]]]], np.float32)

    decoded = decode_unit(encode_maxabs(values, "int8", AXES)[0])

    assert decoded.ravel().tolist() == pytest.approx([-1.0, 64 / 127])


def test_the_lowest_cosine_is_that_of_the_worst_record():
    values = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    stored = np.array([[1.0, 0.0], [1.0, 0.0]], np.float16)

    assert lowest_cosine_of_arrays(values, stored) == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_the_cosine_is_computed_in_double_precision(dtype):
    maps = np.random.default_rng(0).standard_normal((7, 2, 5, 5)).astype(np.float32) * 1e-30
    maps[3] *= 1e25
    stored, _ = encode_maxabs(maps, dtype, axes=(1, 2, 3))
    stored.flags.writeable = False  # as those of a mapped file

    a, b = (x.reshape(7, -1).astype(np.float64) for x in (maps, decode_unit(stored)))
    expected = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))

    assert cosines(maps, stored) == pytest.approx(expected, rel=1e-12)


def test_a_map_that_was_lost_has_cosine_zero():
    assert lowest_cosine_of_arrays(np.ones((1, 4), np.float32), np.zeros((1, 4), np.float16)) == 0.0


def test_a_map_with_one_high_peak_is_too_much_for_int8():
    values = np.full((1, 1, 6, 32, 32), 1 / 300, np.float32)
    values[0, 0, 0, 0, 0] = 1

    assert lowest_cosine_of_arrays(values, encode_maxabs(values, "int8", AXES)[0]) < 0.99
    assert lowest_cosine_of_arrays(values, encode_maxabs(values, "float16", AXES)[0]) > 0.99999


def with_shape(text):
    """An npy file of two rows of three numbers whose header declares another shape."""
    data = encode_npy(np.ones((2, 3), np.float32))
    end = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:end].decode().rstrip().replace("(2, 3)", text).encode()
    return data[:8] + len(header).to_bytes(2, "little") + header + data[end:]


def several():
    file = io.BytesIO()
    np.savez(file, a=np.ones((2, 3)))
    return file.getvalue()


@for_each(
    "data,reason",
    [
        (b"", "not an npy file"),
        (pickle.dumps(np.ones((2, 3))), "not an npy file"),
        (several(), "several arrays"),
        (encode_npy(np.ones((2, 3), np.float32))[:60], "not an npy file"),
        (encode_npy(np.ones((2, 3), np.float32))[:-1], "23 bytes of values in place of 24"),
        (with_shape("(99999999999999999999, 3)"), "its shape is"),
        (with_shape("(99999999999999999999, 0)"), "its shape is"),
        (with_shape("(-2, -3)"), "its shape is"),
        (with_shape("(2, 30)"), "24 bytes of values in place of 240"),
        (with_shape("(" * 5000), "not an npy file"),
        (with_shape("(2.0, 3)"), "not an npy file"),
        (encode_npy(np.ones((3, 2), np.float32)), r"its shape is \(3, 2\)"),
        (encode_npy(np.ones(2, np.float32)), r"its shape is \(2,\)"),
        (encode_npy(np.ones((2, 3), "<U3")), "of type <U3"),
        (encode_npy(np.ones((2, 3), np.complex64)), "of type complex64"),
        (encode_npy(np.ones((2, 3), [("a", "f4")])), "of type"),
        (encode_npy(np.full((2, 3), np.nan, np.float32)), "not finite"),
        (encode_npy(np.full((2, 3), np.inf)), "not finite"),
    ],
)
def test_an_array_that_is_not_the_wanted_one_is_refused_in_words(data, reason):
    with pytest.raises(FormatError, match=reason):
        parse_npy(data, "fiu", (2, None if "240" in reason else 3))


@pytest.mark.parametrize("dtype", ["<f2", ">f8", "<i4", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_any_byte_order_and_layout_is_read_as_numpy_reads_it(dtype, order):
    values = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)

    read = parse_npy(encode_npy(values), "fiu", (2, None))

    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)
