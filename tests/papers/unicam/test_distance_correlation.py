"""Algebra of distance correlation, on features with known values or known symmetries."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from scipy import stats

from permafrost_papers.unicam.estimators import (
    InnerProducts,
    centered_gram,
    distances_of_gram,
    feature_distances,
    inner,
    label_features,
    num_records,
    semi_partial,
    square,
    u_centered,
)
from tests.support.tensors import gaussian


def products(
    *, biased: bool = False, permutations: int = 0, seed: int = 0, **features: torch.Tensor
) -> InnerProducts:
    distances = {name: feature_distances(values) for name, values in features.items()}
    return InnerProducts.from_distances(
        distances, biased=biased, permutations=permutations, seed=seed
    )


def r_star(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(products(x=x, y=y).correlation("x", "y"))


def labeled(n: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, 12] that depend on labels, and the one-hot labels [n, classes]."""
    labels = torch.arange(n) % classes
    hot = torch.nn.functional.one_hot(labels, classes).double()
    return gaussian(0, n, 12) + 2 * hot @ gaussian(1, classes, 12), hot


def dependent(n: int, seed: int) -> InnerProducts:
    """Two views x and y of a common part, of whose first coordinate the labels g are the sign."""
    common = gaussian(seed, n, 3)
    x, y = (common + factor * gaussian(seed + k, n, 3) for k, factor in ((1000, 0.7), (2000, 1)))
    sign = (common[:, :1] > 0).double()
    return products(permutations=19, x=x, y=y, g=torch.cat([sign, 1 - sign], dim=1))


def test_intervals_cover_the_values_of_a_large_sample():
    large = dependent(1500, 0)
    truth = float(large.correlation("x", "y")), float(large.semi_partial("x", "y", "g"))
    intervals = [
        (table.interval("x", "y"), table.interval("x", "g", "y"))
        for table in (dependent(60, seed) for seed in range(1, 151))
    ]
    for number, value in enumerate(truth):
        covered = np.mean([low <= value <= high for low, high in (i[number] for i in intervals)])
        assert 0.9 <= covered <= 0.99


# ---- known answers -------------------------------------------------------------------------------


def test_published_examples_of_another_implementation():
    """Compare with u_distance_correlation_sqr and partial_distance_correlation in dcor's documentation."""
    a = torch.arange(1.0, 17.0).view(4, 4)
    b = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    assert r_star(a, b) == pytest.approx(-0.5, abs=1e-12)

    x, y, z = (
        torch.tensor(values).double()[:, None]
        for values in ([1, 1, 2, 2, 3], [1, 2, 1, 2, 1], [1, 2, 2, 1, 2])
    )
    table = products(x=x, y=y, z=z)
    assert float(table.partial("x", "z", "y")) == pytest.approx(-0.5, abs=1e-12)
    assert float(table.partial("x", "z", "x")) == pytest.approx(1, abs=1e-12)
    assert float(table.partial("x", "z", "z")) == pytest.approx(0, abs=1e-12)


def test_a_hand_computed_u_centered_matrix():
    """Points 0, 1, 2, 3 on a line: row sums 6, 4, 4, 6, total 20."""
    centered = square(u_centered(feature_distances(torch.arange(4.0)[:, None])))

    expected = torch.zeros(4, 4, dtype=torch.float64)
    sums = [6, 4, 4, 6]
    for i in range(4):
        for j in range(4):
            if i != j:
                expected[i, j] = abs(i - j) - sums[i] / 2 - sums[j] / 2 + 20 / 6

    torch.testing.assert_close(centered, expected, rtol=0, atol=1e-12)


def test_p_values_are_students_and_uniform_under_independence():
    table = products(x=gaussian(0, 30, 3), y=gaussian(1, 30, 3))
    freedom = 30 * 27 / 2 - 1
    value = torch.tensor(0.1, dtype=torch.float64)
    expected = stats.t.sf(freedom**0.5 * 0.1 / 0.99**0.5, freedom)
    assert table.p_value(value) == pytest.approx(expected, rel=1e-12)
    assert table.p_value(torch.tensor(1.0)) == 0

    found = []
    for seed in range(200):
        table = products(x=gaussian(2 * seed + 10, 24, 40), y=gaussian(2 * seed + 11, 24, 40))
        found.append(table.p_value(table.correlation("x", "y")))
    assert stats.kstest(found, "uniform").pvalue > 0.01


# ---- invariances ---------------------------------------------------------------------------------


def test_r_star_of_itself_is_one_whatever_its_scale_place_and_rotation():
    x = gaussian(0, 40, 7)
    turned, _ = torch.linalg.qr(gaussian(1, 7, 7))

    for moved in (x, 1000 * x, 1e-3 * x + 5, x @ turned, torch.cat([x, torch.zeros(40, 3)], 1)):
        assert r_star(x, moved) == pytest.approx(1, abs=1e-12)
    close = 1000 + 1e-3 * x  # a small but real difference is not taken for rounding
    assert r_star(close, close) == pytest.approx(1)


def test_rows_of_a_u_centered_matrix_sum_to_nothing_and_forget_a_constant():
    distances = feature_distances(gaussian(0, 25, 6))

    centered = u_centered(distances)

    assert square(centered).sum(dim=1).abs().max() < 1e-12
    torch.testing.assert_close(u_centered(distances + 17), centered, rtol=0, atol=1e-12)


def test_the_biased_form_calls_any_two_wide_networks_alike_and_the_corrected_one_does_not():
    """n = 128 records, p = 5000 features, independent."""
    features = {"x": gaussian(0, 128, 5000), "y": gaussian(1, 128, 5000)}

    corrected = products(**features)
    biased = products(**features, biased=True)

    assert abs(float(corrected.correlation("x", "y"))) < 0.05
    assert float(biased.correlation("x", "y")) > 0.98


def test_the_biased_form_is_the_mean_of_products_about_row_and_column_means():
    x, y = gaussian(0, 12, 3), gaussian(1, 12, 2)
    centered = []
    for features in (x, y):
        matrix = torch.cdist(features, features).numpy()
        rows, columns = matrix.mean(1, keepdims=True), matrix.mean(0, keepdims=True)
        centered.append(matrix - rows - columns + matrix.mean())
    xy, xx, yy = (
        float(np.mean(a * b))
        for a, b in ((centered[0], centered[1]), (centered[0],) * 2, (centered[1],) * 2)
    )

    found = products(x=x, y=y, biased=True).correlation("x", "y")

    assert float(found) == pytest.approx(xy / (xx * yy) ** 0.5, abs=1e-12)


def test_two_classes_give_the_same_numbers_whatever_their_embeddings():
    x, hot = labeled(30, classes=2)
    found = [
        r_star(x, label_features(hot, embeddings))
        for embeddings in (None, gaussian(3, 2, 8), 40 * gaussian(4, 2, 700))
    ]

    assert found[1:] == pytest.approx([found[0]] * 2, abs=1e-12)
    assert found[0] > 0.1


def test_a_record_of_two_classes_has_the_mean_of_their_embeddings():
    embeddings = gaussian(0, 3, 4)

    found = label_features(torch.tensor([[1.0, 0, 1], [0, 1, 0]]), embeddings)

    torch.testing.assert_close(found[0], (embeddings[0] + embeddings[2]) / 2)
    torch.testing.assert_close(found[1], embeddings[1])


# ---- removal -------------------------------------------------------------------------------------


def without(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Condensed A~ without its component along B~, by definition."""
    return a - inner(a, b) / inner(b, b) * b


def inner_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(inner(a, b) / (inner(a, a) * inner(b, b)).sqrt())


def test_what_is_left_is_orthogonal_to_what_was_taken_and_taking_it_again_changes_nothing():
    x, _ = labeled(30)
    a, b = (u_centered(feature_distances(v)) for v in (x, x[:, :5] + gaussian(5, 30, 5)))

    left = without(a, b)

    assert float(inner(left, b)) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(without(left, b), left, rtol=0, atol=1e-13)


def test_nothing_is_left_of_a_network_given_itself():
    x, hot = labeled(30)
    table = products(a=x, b=3 * x + 1, labels=hot)

    assert float(table.semi_partial("a", "b", "labels")) == 0
    assert float(table.partial("a", "b", "labels")) == 0
    noisy = x.float() + 1e-6 * gaussian(9, 30, 12).float()  # rounding noise, as from another device
    table = products(a=x, b=noisy, labels=hot)
    assert float(table.semi_partial("a", "b", "labels")) == 0


def test_rs_from_three_correlations_is_its_definition_by_matrices():
    x, hot = labeled(40)
    y = x[:, :6] + gaussian(7, 40, 6)
    table = products(a=x, b=y, g=hot)
    a, b, g = (u_centered(feature_distances(v)) for v in (x, y, hot))

    assert float(table.semi_partial("a", "b", "g")) == pytest.approx(
        inner_cosine(without(a, b), g), abs=1e-14
    )
    assert float(table.partial("a", "b", "g")) == pytest.approx(
        inner_cosine(without(a, b), without(g, b)), abs=1e-14
    )
    assert abs(float(table.partial("a", "b", "g"))) > abs(float(table.semi_partial("a", "b", "g")))


def test_taking_away_what_is_shared_brings_out_what_is_not():
    """T = [S, N], where S and N are independent."""
    shared, own = gaussian(0, 300, 4), gaussian(1, 300, 4)
    table = products(t=torch.cat([shared, own], dim=1), s=shared, n=own)

    assert float(table.semi_partial("t", "s", "s")) == pytest.approx(0, abs=1e-12)
    left, whole = float(table.semi_partial("t", "s", "n")), float(table.correlation("t", "n"))
    assert left > 0.9 > 0.8 > whole


def test_rs_is_zero_where_nothing_else_would_be_finite():
    one = torch.tensor(1.0, dtype=torch.float64)

    assert float(semi_partial(one / 2, one, one / 3)) == 0
    table = products(dead=torch.ones(10, 3), x=gaussian(0, 10, 3))
    assert float(table.correlation("dead", "x")) == 0
    assert float(table.correlation("dead", "dead")) == 0


# ---- sums ----------------------------------------------------------------------------------------


def test_an_inner_product_of_blocks_is_unbiased():
    x = gaussian(0, 1600, 5)
    y = x[:, :3] + gaussian(1, 1600, 3)
    whole = products(x=x, y=y).sums[0, 1]
    blocks = [products(x=a, y=b) for a, b in zip(x.split(16), y.split(16), strict=True)]

    means = torch.stack([block.sums[0, 1] for block in blocks])

    error = means.std() / len(means) ** 0.5
    assert abs(float(means.mean() - whole)) < 3 * float(error)


@pytest.mark.slow
def test_a_ratio_of_sums_is_not_biased_by_small_blocks_and_a_mean_of_ratios_is():
    x = gaussian(0, 12800, 5)
    y = x[:, :3] + gaussian(1, 12800, 3)
    truth = r_star(x[:3000], y[:3000])
    blocks = [products(x=a, y=b) for a, b in zip(x.split(8), y.split(8), strict=True)]
    ratios = torch.stack([block.correlation("x", "y") for block in blocks])
    error = float(ratios.std() / len(ratios) ** 0.5)

    assert float(reduce(InnerProducts.merge, blocks).correlation("x", "y")) == pytest.approx(
        truth, abs=3 * error
    )
    assert float(ratios.mean()) < truth - 3 * error


@pytest.mark.parametrize("ranks", [3, 4])
def test_blocks_add_up_to_the_same_numbers_however_they_are_shared_out(ranks):
    x, hot = labeled(384)
    blocks = [
        products(a=a, b=a[:, :5], g=g) for a, g in zip(x.split(32), hot.split(32), strict=True)
    ]

    whole = reduce(InnerProducts.merge, blocks)
    shared = reduce(
        InnerProducts.merge,
        [reduce(InnerProducts.merge, blocks[rank::ranks]) for rank in range(ranks)],
    )

    torch.testing.assert_close(shared.sums, whole.sums, rtol=1e-12, atol=0)
    assert (shared.records, shared.blocks, shared.freedom) == (384, 12, 12 * 32 * 29 // 2)
    one, other = (table.semi_partial("a", "b", "g") for table in (whole, shared))
    assert float(one) == pytest.approx(float(other), abs=1e-12)
    with pytest.raises(ValueError, match="cannot be merged"):
        whole.merge(products(a=x[:8], b=x[:8]))


def test_columns_may_lie_on_different_ranks():
    features = gaussian(0, 20, 301).float()
    parts = sum(centered_gram(part) for part in (features[:, :100], features[:, 100:]))

    torch.testing.assert_close(
        distances_of_gram(parts), feature_distances(features), rtol=1e-12, atol=0
    )


# ---- numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 5000])
def test_distances_by_inner_products_are_exact_far_from_the_origin(columns):
    """A float32 Gram matrix is wrong in the first digit at a feature mean of 1000."""
    features = (1000 + gaussian(0, 40, 5000)).float()
    direct = torch.stack([(row - features.double()).norm(dim=1) for row in features.double()])

    found = square(distances_of_gram(centered_gram(features, columns=columns)))

    assert (found - direct).abs().max() < 1e-10
    gram = features @ features.T
    norms = gram.diagonal()
    rough = (norms[:, None] + norms - 2 * gram).clamp(min=0).sqrt()
    assert (rough - direct).abs().max() > 1  # control: a float32 Gram matrix is far off


def test_unit_length_forgets_the_length_of_each_record():
    x = gaussian(0, 12, 30)
    longer = x * torch.rand(12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    one, other = (feature_distances(values, l2norm=True) for values in (x, longer))

    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    directions = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(one, feature_distances(directions), rtol=1e-12, atol=0)
    assert not torch.allclose(one, feature_distances(x))


def test_equal_records_are_at_distance_zero():
    features = (1000 * gaussian(0, 3, 700)).repeat(2, 1)

    distances = square(feature_distances(features))

    assert [float(distances[i, i + 3]) for i in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("n", [2, 3])
def test_fewer_than_four_records_are_refused(n):
    with pytest.raises(ValueError, match=f"at least 4 records, got {n}"):
        products(x=gaussian(0, n, 3))
    assert num_records(feature_distances(gaussian(0, n, 3))) == n


# ---- labels of many and of few classes -----------------------------------------------------------


def test_records_of_as_many_classes_say_exactly_nothing():
    """All one-hot labels are equally far apart, so that their rounding errors must not be divided by themselves."""
    for n in (12, 37, 128, 200):
        labels = torch.eye(n, 1000)
        features = gaussian(n, n, 64) + 5 * labels.double() @ gaussian(1, 1000, 64)
        table = products(x=features, labels=labels)
        assert float(table.correlation("x", "labels")) == 0
        assert not u_centered(feature_distances(labels)).any()


def permuted(seed: int, labels: torch.Tensor, permutations: int = 199, **features: torch.Tensor):
    return products(permutations=permutations, seed=seed, **features, labels=labels)


@pytest.mark.parametrize(
    ("classes", "width"),
    [pytest.param(*of, marks=pytest.mark.slow) for of in ((2, 1), (2, 64), (10, 1))],
)
def test_permutation_p_values_are_uniform_where_students_t_is_not(classes, width):
    """Independent features and labels of few classes: p < 0.01 in about 1 of 100 cases, and never below 1 / (P + 1)."""
    hot = torch.nn.functional.one_hot(torch.arange(40) % classes).double()
    found = [
        permuted(seed, hot, x=gaussian(seed, 40, width)).permutation_p("x") for seed in range(300)
    ]

    assert min(found) >= 1 / 200
    assert np.mean(np.array(found) <= 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(np.array(found) <= 0.01) < 0.03
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_a_permutation_p_of_rs_sees_what_is_left_and_only_that():
    x, hot = labeled(60)
    copy = x + 1e-3 * gaussian(5, 60, 12)
    noise = gaussian(6, 60, 12)
    table = permuted(0, hot, x=x, copy=copy, noise=noise)

    assert table.permutation_p("x") == 1 / 200
    assert table.permutation_p("x", "noise") == 1 / 200
    assert table.permutation_p("noise", "x") > 0.05
    same = permuted(0, hot, x=x, other=2 * x)
    assert same.permutation_p("x", "other") == 1


def test_permutations_add_up_over_blocks_and_need_to_be_asked_for():
    x, hot = labeled(60)
    parts = [permuted(s, hot[s::2], x=x[s::2]) for s in range(2)]

    assert reduce(InnerProducts.merge, parts).permuted.shape == (2, 199)
    assert reduce(InnerProducts.merge, parts).permutation_p("x") == 1 / 200
    with pytest.raises(ValueError, match="without permutations"):
        products(x=x, labels=hot).permutation_p("x")


@pytest.mark.parametrize("value", [1.0, -1.0, -1.0000000000000002, 1.0000000000000002])
def test_students_p_ends_at_its_limits(value):
    table = products(x=gaussian(0, 30, 3), y=gaussian(1, 30, 3))

    assert table.p_value(torch.tensor(value, dtype=torch.float64)) == float(value < 0)


def test_the_sums_without_a_record_are_those_of_the_others():
    features = {"x": gaussian(0, 12, 3), "y": gaussian(1, 12, 4), "labels": gaussian(2, 12, 2)}
    table = products(permutations=19, **features)

    for record in range(12):
        kept = torch.arange(12) != record
        expected = products(**{name: values[kept] for name, values in features.items()}).sums
        torch.testing.assert_close(table.without[..., record], expected, rtol=0, atol=1e-12)


def test_blocks_leave_out_each_of_their_records():
    x, hot = labeled(60)
    one, other = (permuted(s, hot[s::2], x=x[s::2], y=gaussian(s, 30, 2)) for s in range(2))

    both = one.merge(other)

    assert both.without.shape == (3, 3, 60)
    torch.testing.assert_close(both.without[..., 0], one.without[..., 0] + other.sums)
    torch.testing.assert_close(both.without[..., 59], one.sums + other.without[..., 29])


@pytest.mark.slow
def test_a_p_of_rs_allows_for_what_given_has_to_do_with_the_labels():
    """A is a part of B, which depends on the labels: RS is 0 up to noise, which permuted labels underestimate."""
    centers = 3 * gaussian(102, 4, 4)  # RS of large samples is 0 for these centers
    found, by_permutation = [], []
    for seed in range(120):
        hot = torch.nn.functional.one_hot(torch.arange(80) % 4, 4).double()
        b = hot @ centers + gaussian(1000 + seed, 80, 4)
        table = permuted(seed, hot, 99, a=b[:, :2], b=b)
        found.append(table.residual_p("a", "b"))
        by_permutation.append(table.permutation_p("a", "b"))

    large = torch.nn.functional.one_hot(torch.arange(1600) % 4, 4).double()
    b = large @ centers + gaussian(5, 1600, 4)
    assert abs(float(products(a=b[:, :2], b=b, g=large).semi_partial("a", "b", "g"))) < 0.03
    assert np.mean(np.array(found) <= 0.05) < 0.1
    tails = np.abs(np.array(by_permutation) - 0.5) >= 0.45
    assert tails.mean() > 0.25  # control: both tails together should contain a tenth
