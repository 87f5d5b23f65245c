"""Accuracy of max-abs storage."""

import numpy as np
import pytest

from permafrost.store.codecs import decode_unit, encode_maxabs, lowest_cosine

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
    assert lowest_cosine(values[:, 0], stored[:, 0]) >= cosine
    np.testing.assert_allclose(scales[:, 0], np.abs(values).max(axis=AXES)[:, 0], rtol=1e-6)
    decoded = decode_unit(stored) * scales[:, :, None, None, None]
    np.testing.assert_allclose(decoded, values, atol=scales.max() / 250)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_zero_map_survives(dtype):
    stored, scales = encode_maxabs(np.zeros((2, 1, 1, 7, 7), np.float32), dtype, AXES)

    assert not stored.any()
    assert not scales.any()
    assert lowest_cosine(np.zeros((2, 49), np.float32), stored.reshape(2, 49)) == 1.0


def test_signs_survive():
    values = np.array([[[[[-2.0, 1.0]]]]], np.float32)

    decoded = decode_unit(encode_maxabs(values, "int8", AXES)[0])

    assert decoded.ravel().tolist() == pytest.approx([-1.0, 64 / 127])


def test_the_lowest_cosine_is_that_of_the_worst_record():
    values = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    stored = np.array([[1.0, 0.0], [1.0, 0.0]], np.float16)

    assert lowest_cosine(values, stored) == pytest.approx(np.sqrt(0.5))


def test_a_map_that_was_lost_has_cosine_zero():
    assert lowest_cosine(np.ones((1, 4), np.float32), np.zeros((1, 4), np.float16)) == 0.0


def test_a_map_with_one_high_peak_is_too_much_for_int8():
    values = np.full((1, 1, 6, 32, 32), 1 / 300, np.float32)
    values[0, 0, 0, 0, 0] = 1

    assert lowest_cosine(values, encode_maxabs(values, "int8", AXES)[0]) < 0.99
    assert lowest_cosine(values, encode_maxabs(values, "float16", AXES)[0]) > 0.99999
