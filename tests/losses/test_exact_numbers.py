"""Every loss and codec against exact arithmetic, over shapes, dtypes, sizes and temperatures: right, or refused."""

from __future__ import annotations

from itertools import product

import mpmath
import numpy as np
import pytest
import torch

import permafrost
from permafrost.core.batches import TopLogits
from permafrost.core.errors import ConfigError
from permafrost.losses.feature_kd import attention_loss, class_map_loss, covered_mse
from permafrost.losses.labels import bce_loss, cross_entropy_loss, off_label_bce_loss
from permafrost.losses.logit_distances import kd_loss, mld_loss, softmax_mse_loss
from permafrost.losses.map_distances import map_cosine, upsampling_gram
from permafrost.losses.projected_features import covered_cosine
from permafrost.store.codecs import cosines, decode_scaled, decode_unit
from permafrost_papers.e2kd.guided import LOCALIZATIONS
from permafrost_papers.e2kd.review_kd import hierarchical_context_loss
from tests.support.items import for_each
from tests.support.tensors import encode_maxabs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2), (3, 7), (2, 1), (1, 40))
SIZES = (1e-3, 1.0, 30.0, 1e4)
TEMPERATURES = (1e-6, 0.05, 1.0, 4.0, 20.0, 1e3, 1e6, 1e9)


@pytest.fixture(autouse=True)
def exact():
    with mpmath.workdps(60):
        yield


def draw(seed, shape, size, dtype):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def rows(tensor):
    return [[mpmath.mpf(float(value)) for value in row] for row in tensor]


def softmax(row, tau):
    largest = max(row)
    powers = [mpmath.exp((value - largest) / tau) for value in row]
    return [power / mpmath.fsum(powers) for power in powers]


def exact_kd(student, teacher, tau):
    total = 0
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t, tau), softmax(s, tau)
        total += mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return tau**2 * total / len(student)


def exact_softmax_mse(student, teacher, tau):
    total = 0
    for s, t in zip(student, teacher, strict=True):
        pairs = zip(softmax(t, tau), softmax(s, tau), strict=True)
        total += mpmath.fsum((a - b) ** 2 for a, b in pairs) / len(s)
    return tau**2 * total / len(student)


def exact_mld(student, teacher, tau):
    total = 0
    for s, t in zip(student, teacher, strict=True):
        for a, b in zip(t, s, strict=True):
            for sign in (1, -1):
                p, q = (1 / (1 + mpmath.exp(-sign * value / tau)) for value in (a, b))
                total += p * mpmath.log(p / q) if p > 0 else 0
    return tau * total / len(student)


LOSSES = {
    "kd_loss": (kd_loss, exact_kd),
    "softmax_mse_loss": (softmax_mse_loss, exact_softmax_mse),
    "mld_loss": (mld_loss, exact_mld),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_of_logits_are_exact_at_every_temperature(name, dtype):
    loss, exact_loss = LOSSES[name]
    wrong = []
    for seed, (shape, size, tau) in enumerate(product(SHAPES, SIZES, TEMPERATURES)):
        student, teacher = draw(seed, shape, size, dtype), draw(seed + 999, shape, size, dtype)
        actual = loss(student, teacher, tau)
        expected = exact_loss(rows(student), rows(teacher), mpmath.mpf(tau))
        # Logits of 1e4 / 0.05 have steps of 0.02 in float32, as large as some divergences.
        steps = (
            float(max(abs(student).max(), abs(teacher).max())) * tau * torch.finfo(actual.dtype).eps
        )
        tolerance = (1e-9 if dtype == torch.float64 else 1e-4) * abs(expected) + 4 * steps
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if not abs(mpmath.mpf(actual.item()) - expected) <= tolerance:
            wrong.append((shape, size, tau, actual.item(), float(expected)))
    assert not wrong


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_distances_of_logits_are_those_of_float64(name):
    loss, _ = LOSSES[name]
    for seed, (size, tau) in enumerate(product((1e-2, 1.0, 30.0), (0.05, 1.0, 20.0, 1e3, 1e6))):
        student, teacher = (draw(s, (4, 9), size, torch.float64) for s in (seed, seed + 99))
        gradients = []
        for dtype in (torch.float32, torch.float64):
            leaf = student.float().to(dtype).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, teacher.float().to(dtype), tau), leaf)
            gradients.append(gradient.double())
        largest = gradients[1].abs().max()
        difference = (gradients[0] - gradients[1]).abs().max()
        assert difference <= 2e-4 * largest + 1e-30, (size, tau)  # below, float32 has zeros


def test_a_class_that_cannot_be_does_not_make_the_loss_nan():
    teacher = torch.tensor([[1.0, -torch.inf, 2.0]])
    student = torch.tensor([[0.5, 1.0, 2.0]], requires_grad=True)

    loss = kd_loss(student, teacher, 2.0)

    p, q = teacher.div(2).softmax(1), student.detach().div(2).softmax(1)
    expected = 4 * (p[:, [0, 2]] * (p / q)[:, [0, 2]].log()).sum()
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, 2 * (q - p))


@pytest.mark.parametrize("tau", [1.0, 20.0, 1e3])
def test_the_largest_logits_have_the_divergence_of_merged_outcomes(tau):
    student, teacher = (draw(seed, (3, 9), 3.0, torch.float32) for seed in (1, 2))
    values, classes = teacher.topk(4, dim=1)
    rest = (teacher.double() / tau).scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
    stored = TopLogits(
        values=values, classes=classes, rest=rest.float(), temperatures=(tau,), num_classes=9
    )

    actual = kd_loss(student, stored, tau).item()

    merged = []
    for each in (student, teacher):
        kept = [each.gather(1, classes)[n].tolist() for n in range(3)]
        tails = (each.double() / tau).scatter(1, classes, -torch.inf).logsumexp(1)
        merged.append(
            [
                [*map(mpmath.mpf, row), mpmath.mpf(tau) * tail.item()]
                for row, tail in zip(kept, tails, strict=True)
            ]
        )
    expected = exact_kd(*merged, mpmath.mpf(tau))
    assert actual == pytest.approx(float(expected), rel=1e-4, abs=tau**2 * 1e-12)


@pytest.mark.parametrize("offset", [100.0, 1e4, 1e5])
def test_what_all_logits_have_in_common_makes_no_difference(offset):
    student, teacher = (draw(seed, (4, 9), 3.0, torch.float32) for seed in (1, 2))
    moved = [(logits + offset).float() for logits in (student, teacher)]
    expected = exact_kd(*map(rows, moved), mpmath.mpf(2))

    assert kd_loss(*moved, 2.0).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["kd_loss", "mld_loss", "softmax_mse_loss"])
def test_logits_that_are_no_numbers_give_no_finite_loss(name, value):
    teacher = torch.randn(4, 3)
    teacher[1, 1] = value

    result = LOSSES[name][0](torch.randn(4, 3), teacher, 2.0)
    assert not result.isfinite() or (name != "kd_loss" and value == torch.inf)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_those_of_the_definition(name):
    loss, _ = LOSSES[name]
    weight = draw(1, (5, 3), 1.0, torch.float64).requires_grad_()
    inputs, teacher = draw(2, (4, 5), 1.0, torch.float64), draw(3, (4, 3), 1.0, torch.float64)

    def values(weight):
        return loss(inputs @ weight, teacher, 2.0)

    assert torch.autograd.gradcheck(values, (weight,))
    assert torch.autograd.gradgradcheck(values, (weight,))


@pytest.mark.parametrize("tau", [0.0, -1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_temperature_that_is_not_positive_is_refused(name, tau):
    with pytest.raises(ConfigError, match=f"{name} needs a temperature tau > 0"):
        LOSSES[name][0](torch.zeros(2, 3), torch.zeros(2, 3), tau)


def test_maps_compared_in_inference_mode_leave_later_gradients_alone():
    maps = torch.rand(1, 1, 1, 3, 3)
    with torch.inference_mode():
        map_cosine(maps, maps, (11, 12))
    student = torch.rand(1, 1, 1, 3, 3, requires_grad=True)

    map_cosine(student, maps, (11, 12))[0].sum().backward()
    assert student.grad.isfinite().all()


# ---- shapes ----------------------------------------------------------------------------------------


LOGIT_SHAPES = [
    ((8, 1, 5), (8, 5)), ((8, 5), (1, 5)), ((8, 5), (8, 1)), ((8, 5), (5,)), ((8, 5), (8, 6)),
    ((8, 5), (7, 5)), ((5,), (5,)), ((2, 8, 5), (2, 8, 5)), ((8, 5), (8, 5, 1)),
]  # fmt: skip


@for_each("name,shapes", product(LOSSES, LOGIT_SHAPES))
def test_logits_of_other_shapes_are_refused_with_both(name, shapes):
    one, other = (torch.zeros(shape) for shape in shapes)

    with pytest.raises(ConfigError) as error:
        LOSSES[name][0](one, other, 1.0)
    assert name in str(error.value)
    assert str(list(shapes[0])) in str(error.value)
    assert str(list(shapes[1])) in str(error.value)


@for_each(
    "call,one,other",
    [
        (lambda a, b: permafrost.map_cosine(a, b, (8, 8)), (2, 1, 1, 4, 4), (2, 1, 4, 4)),
        (lambda a, b: permafrost.map_cosine(a, b, (8, 8)), (2, 1, 1, 4, 4), (1, 1, 1, 4, 4)),
        (lambda a, b: permafrost.map_cosine(a, b, (8, 8)), (2, 2, 1, 4, 4), (2, 1, 1, 4, 4)),
        (attention_loss, (2, 4, 4), (1, 4, 4)),
        (attention_loss, (2, 4, 4), (2, 1, 4, 4)),
        (lambda a, b: class_map_loss(a, b, 2), (2, 5, 4, 4), (2, 1, 4, 4)),
        (lambda a, b: class_map_loss(a, b, 2), (2, 5, 4, 4), (5, 4, 4)),
        (hierarchical_context_loss, (2, 5, 4, 4), (2, 5, 4, 1)),
        (lambda a, b: covered_mse(a, b, None), (2, 5, 4, 4), (2, 1, 4, 4)),
        (lambda a, b: covered_cosine(a, b, None), (2, 5, 4, 4), (1, 5, 4, 4)),
        (lambda a, b: cross_entropy_loss(a, b.long()), (4, 5), (4, 1)),
        (lambda a, b: cross_entropy_loss(a, b.long()), (4, 5), (3,)),
        (lambda a, b: cross_entropy_loss(a, b), (4, 5), (4, 5)),
        (bce_loss, (4, 5), (4, 6)),
        (bce_loss, (4, 5), (4,)),
        (lambda a, b: bce_loss(a, b.long()), (4, 5), (5,)),
        (off_label_bce_loss, (4, 5), (1, 5)),
        *((loss, (2, 4, 4), (4, 4)) for loss in LOCALIZATIONS.values()),
    ],
)
def test_tensors_of_other_shapes_are_refused_with_both(call, one, other):
    with pytest.raises(ConfigError) as error:
        call(torch.rand(one), torch.rand(other))
    assert str(list(one)) in str(error.value)
    assert str(list(other)) in str(error.value)


# ---- other losses ----------------------------------------------------------------------------------


def maps(seed, shape, size, dtype):
    return draw(seed, shape, size, torch.float64).abs().to(dtype)


def double(*tensors):
    return tuple(tensor.double() for tensor in tensors)


SCALE_FREE = {
    "map_cosine": (lambda a, b: map_cosine(a, b, (8, 8))[0], (3, 1, 1, 5, 5)),
    "attention_loss": (attention_loss, (3, 5, 5)),
    "class_map_loss, normalized": (lambda a, b: class_map_loss(a, b, 3, normalize=True), (3, 4, 6, 6)),
    "covered_cosine": (lambda a, b: covered_cosine(a, b, None), (3, 4, 5, 5)),
}  # fmt: skip
SCALED = {
    "class_map_loss": (lambda a, b: class_map_loss(a, b, 3), (3, 4, 6, 6)),
    "covered_mse": (lambda a, b: covered_mse(a, b, None), (3, 4, 5, 5)),
    "hierarchical_context_loss": (hierarchical_context_loss, (3, 4, 8, 8)),
}


@pytest.mark.parametrize("name", SCALE_FREE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (1e-5, 1e4), (1e-30, 1e-30), (1e25, 1e-25)])
def test_losses_of_any_scale_are_those_of_float64(name, dtype, sizes):
    loss, shape = SCALE_FREE[name]
    one, other = (maps(seed, shape, size, dtype) for seed, size in enumerate(sizes))
    if not (one.isfinite().all() and other.isfinite().all() and one.any() and other.any()):
        pytest.skip("not in the range of the dtype")

    scaled = [tensor / tensor.abs().max() for tensor in double(one, other)]
    torch.testing.assert_close(
        loss(one, other).double(), loss(*scaled).double(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_differences_are_those_of_float64(name, dtype, size):
    loss, shape = SCALED[name]
    one, other = (maps(seed, shape, size, dtype) for seed in (1, 2))

    expected = loss(*double(one, other))
    torch.testing.assert_close(loss(one, other).double(), expected, rtol=1e-4, atol=1e-6 * size**2)


@pytest.mark.parametrize("name", LOCALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_localizations_are_those_of_float64(name, dtype, size):
    attributions = draw(3, (4, 6, 6), size, dtype)
    regions = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5

    expected = LOCALIZATIONS[name](attributions.double(), regions)
    actual = LOCALIZATIONS[name](attributions, regions)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_losses_of_labels_are_those_of_float64(dtype, size):
    logits = draw(5, (6, 5), size, dtype)
    labels, many = torch.tensor([0, 4, -1, 2, 2, 1]), (torch.rand(6, 5) > 0.5).float()
    for loss in (
        lambda x: cross_entropy_loss(x, labels),
        lambda x: cross_entropy_loss(x, labels, 0.1),
        lambda x: bce_loss(x, labels),
        lambda x: bce_loss(x, many),
        lambda x: off_label_bce_loss(x, labels),
    ):
        torch.testing.assert_close(
            loss(logits).double(), loss(logits.double()).double(), rtol=1e-4, atol=1e-6
        )


def test_the_gram_matrix_of_an_upsampling_is_that_of_its_definition():
    for n, full in ((1, 7), (3, 7), (7, 224), (14, 31)):
        centers = (np.arange(full) + 0.5) * n / full - 0.5
        lower = np.clip(np.floor(centers), 0, n - 1).astype(int)
        upper = np.minimum(lower + 1, n - 1)
        share = np.clip(centers, 0, n - 1) - lower
        matrix = np.zeros((full, n))
        np.add.at(matrix, (np.arange(full), lower), 1 - share)
        np.add.at(matrix, (np.arange(full), upper), share)
        np.testing.assert_allclose(upsampling_gram(n, full).numpy(), matrix.T @ matrix, atol=1e-12)


# ---- codecs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "step"), [("float32", 2**-23), ("float16", 2**-11), ("int8", 1 / 127)]
)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e5, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (4, 9), (3, 2, 5)])
def test_values_relative_to_their_largest_keep_their_precision(stored, step, size, shape):
    values = (size * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    values[0] = 0
    axes = tuple(range(1, len(shape)))

    encoded, scale = encode_maxabs(values, stored, axes)

    decoded = decode_scaled(encoded, scale).astype(np.float64)
    largest = np.abs(values.astype(np.float64)).max(axis=axes, keepdims=True)
    assert (np.abs(decoded - values) <= 0.6 * step * largest + 1e-45).all()
    assert not decoded[0].any()
    flat, unit = (
        values.reshape(len(values), -1).astype(np.float64),
        decode_unit(encoded).reshape(len(values), -1),
    )
    for n, cosine in enumerate(cosines(values, encoded)):
        a, b = flat[n] / max(np.abs(flat[n]).max(), 1e-300), unit[n].astype(np.float64)
        expected = a @ b / np.sqrt((a @ a) * (b @ b)) if a.any() else 1.0
        assert cosine == pytest.approx(expected, abs=1e-12)
