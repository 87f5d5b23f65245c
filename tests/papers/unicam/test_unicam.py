"""UniCAM's objective, its gradient and its maps, on features whose symmetries determine the result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from permafrost_papers.unicam.estimators import InnerProducts, feature_distances
from permafrost_papers.unicam.maps import (
    REDUCTIONS,
    Bank,
    cam,
    explain_record,
    feature_of,
    hirescam,
    mean_of_depths,
    relevance_left,
    reliability,
    row_distances,
)
from tests.support.tensors import gaussian

CLASSES, CHANNELS, GRID = 3, 6, (2, 3)


def activations_of(n: int, seed: int = 0):
    """Activations [n, C, h, w] that depend on labels, a control's features [n, 5] and one-hot labels."""
    hot = F.one_hot(torch.arange(n) % CLASSES, CLASSES).double()
    place = gaussian(99, CLASSES, CHANNELS, *GRID)
    grids = gaussian(seed, n, CHANNELS, *GRID) + torch.einsum("nk,kchw->nchw", hot, place)
    control = grids.mean(dim=(2, 3))[:, :5] + gaussian(seed + 50, n, 5)
    return grids.relu(), control, hot


def batch_gradient(grids, control, hot, depth):
    """J of the whole batch, as in the paper, and its gradient with respect to all activations."""
    leaf = grids.clone().requires_grad_()
    objective = relevance_left(
        F.pdist(feature_of(depth, leaf)), feature_distances(control), feature_distances(hot)
    )
    return objective, torch.autograd.grad(objective, leaf)[0]


def explained(grids, control, hot, depth, place, bank):
    return explain_record(
        grids[place], lambda values: feature_of(depth, values), control[place], hot[place], bank
    )


def bank_of(grids, control, hot, depth, members):
    return Bank.of(feature_of(depth, grids)[members], control[members], hot[members])


DEPTHS = pytest.mark.parametrize("depth", [1, 2])


@DEPTHS
def test_the_objective_is_rs(depth):
    grids, control, hot = activations_of(20)
    distances = {
        "x": feature_distances(feature_of(depth, grids)),
        "given": feature_distances(control),
        "labels": feature_distances(hot),
    }

    objective, _ = batch_gradient(grids, control, hot, depth)

    expected = InnerProducts.from_distances(distances).semi_partial("x", "given", "labels")
    assert float(objective.detach()) == pytest.approx(float(expected), abs=1e-12)


@DEPTHS
def test_its_gradient_knows_neither_place_nor_scale(depth):
    grids, control, hot = activations_of(20)

    _, gradient = batch_gradient(grids, control, hot, depth)

    assert gradient.abs().max() > 1e-6
    assert gradient.sum(dim=0).abs().max() < 1e-12
    assert abs(float((gradient * grids).sum())) < 1e-12


def test_of_pooled_features_the_signed_mass_of_a_batch_is_nothing():
    grids, control, hot = activations_of(20)
    _, gradient = batch_gradient(grids, control, hot, depth=1)

    maps = torch.stack([cam(f, g) for f, g in zip(grids, gradient, strict=True)])

    assert maps.abs().sum() > 1e-3
    assert abs(float(maps.sum())) < 1e-12
    # A ReLU would erase a large part.
    assert 0.2 < float(maps.clamp(min=0).sum() / maps.abs().sum()) < 0.8


@DEPTHS
def test_a_record_against_a_bank_has_the_gradient_of_the_whole_batch(depth):
    grids, control, hot = activations_of(20)
    objective, gradient = batch_gradient(grids, control, hot, depth)
    members = torch.arange(20)

    for place in (0, 7, 19):
        bank = bank_of(grids, control, hot, depth, members[members != place])
        found = explained(grids, control, hot, depth, place, bank)

        assert found.objective == pytest.approx(float(objective.detach()), abs=1e-12)
        torch.testing.assert_close(found.gradient, gradient[place], rtol=0, atol=1e-12)


def test_the_gradient_is_right_by_finite_differences_with_equal_records():
    grids, control, hot = activations_of(9)
    grids[4] = grids[0]  # equal records: the derivative of a plain square root is not finite there
    bank = bank_of(grids, control, hot, 2, torch.arange(1, 9))

    def objective(activation):
        own = row_distances(feature_of(2, activation[None])[0], bank.features)
        return relevance_left(
            torch.cat([own, bank.x]),
            torch.cat([row_distances(control[0], bank.given_features), bank.given]),
            torch.cat([row_distances(hot[0], bank.label_features), bank.labels]),
        )

    found = explained(grids, control, hot, 2, 0, bank)
    assert found.gradient.isfinite().all()
    away = (grids[0] + 0.3 * gaussian(5, CHANNELS, *GRID)).requires_grad_()
    assert torch.autograd.gradcheck(objective, (away,))


def test_a_record_that_is_in_the_bank_is_explained_against_the_others():
    grids, control, hot = activations_of(12)
    whole = bank_of(grids, control, hot, 1, torch.arange(12))
    others = bank_of(grids, control, hot, 1, torch.tensor([0, 1, 2, *range(4, 12)]))

    one, other = (explained(grids, control, hot, 1, 3, bank) for bank in (whole.without(3), others))

    assert one.objective == other.objective
    assert torch.equal(one.gradient, other.gradient)


@DEPTHS
def test_a_network_has_nothing_beyond_itself(depth):
    grids, _, hot = activations_of(16)
    features = feature_of(depth, grids)
    bank = Bank.of(features[1:], features[1:], hot[1:])

    found = explain_record(grids[0], lambda v: feature_of(depth, v), features[0], hot[0], bank)

    assert found.objective == 0
    assert not found.gradient.any()
    assert all(not reduce(grids[0], found.gradient).any() for reduce in REDUCTIONS.values())


def test_both_reductions_agree_where_only_the_average_counts_and_differ_elsewhere():
    grids, control, hot = activations_of(16)
    for depth, same in ((1, True), (2, False)):
        bank = bank_of(grids, control, hot, depth, torch.arange(1, 16))
        gradient = explained(grids, control, hot, depth, 0, bank).gradient

        assert torch.allclose(cam(grids[0], gradient), hirescam(grids[0], gradient)) is same


def test_hand_computed_maps():
    activation = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    gradient = torch.tensor([[[1.0, 3.0]], [[-1.0, 0.0]]]).double()

    assert cam(activation, gradient).tolist() == [[2 * 1 - 0.5 * 3, 2 * 2 - 0.5 * 4]]
    assert hirescam(activation, gradient).tolist() == [[1 - 3, 6 + 0]]


def test_a_larger_bank_gives_more_reliable_maps():
    grids, control, hot = activations_of(60 * 2 + 1, seed=3)
    found = {}
    for size in (6, 60):
        banks = [
            bank_of(grids, control, hot, 1, torch.arange(start, start + size)) for start in (1, 61)
        ]
        maps = [
            cam(grids[0], explained(grids, control, hot, 1, 0, bank).gradient) for bank in banks
        ]
        found[size] = reliability(maps)

    assert found[60] > 0.9
    assert found[60] > found[6]


def test_reliability_is_the_cosine_of_maps():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])

    assert reliability([one, 1e-30 * one]) == pytest.approx(1)
    assert reliability([one, -one]) == pytest.approx(-1)
    assert reliability([one, other]) == pytest.approx(0.5**0.5)
    assert reliability([one, one, other]) == pytest.approx((1 + 2 * 0.5**0.5) / 3)
    assert torch.tensor([reliability([one]), reliability([one, 0 * one])]).isnan().all()


def test_the_mean_over_depths_gives_each_depth_the_same_weight_on_the_finest_grid():
    coarse = torch.tensor([[-2.0]]).double()
    fine = torch.tensor([[4.0, 0.0], [2.0, -4.0]]).double()

    ((mean,),) = mean_of_depths([[[coarse]], [[1000 * fine]]])

    assert mean.tolist() == [[0.0, -0.5], [-0.25, -1.0]]


def test_a_depth_without_evidence_halves_the_mean_of_two():
    fine = gaussian(0, 3, 3)

    ((mean,),) = mean_of_depths([[[torch.zeros(1, 1).double()]], [[fine]]])

    torch.testing.assert_close(mean, fine / fine.abs().max() / 2)


def test_the_mean_over_depths_of_each_bank_averages_to_that_of_the_mean_maps():
    depths = [[[gaussian(10 * side + bank, side, side) for bank in (0, 1)]] for side in (2, 4)]
    averaged = [[[torch.stack(banks).mean(dim=0)] for banks in records] for records in depths]

    (of_banks,) = mean_of_depths(depths)
    ((of_means,),) = mean_of_depths(averaged)

    torch.testing.assert_close(torch.stack(of_banks).mean(dim=0), of_means)
