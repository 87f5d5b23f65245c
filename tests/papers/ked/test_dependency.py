"""Dependency of features, measured on networks that are additive by design."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Classifier
from permafrost.models.providers import freeze
from permafrost_papers.ked.curvature import feature_scales, pixel_probes, table_probes
from permafrost_papers.ked.dependency import DependencySums, inputs_of_a_record, measure_dependency
from permafrost_papers.ked.grouping import group_features
from tests.support.superfeatures import GROUPS, Additive, groups_of, keyed_rows, measured

INSIDE = torch.zeros(9, 9, dtype=torch.bool)

for members in GROUPS:
    INSIDE[np.ix_(members, members)] = True


BETWEEN = ~INSIDE


INSIDE.fill_diagonal_(False)


def hessian(network, record):
    """Hessians [K, d, d] of the logits at one record."""
    num_classes = network(record[None]).shape[1]
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda x, c=c: network(x[None])[0, c], record)
            for c in range(num_classes)
        ]
    )


# ---- dependency ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "derivative"),
    [(nn.GELU, "fd"), (nn.GELU, "hvp"), (nn.GELU, "ablate"), (nn.ReLU, "fd"), (nn.ReLU, "ablate")],
)
def test_groups_of_an_additive_network_are_found_exactly(activation, derivative):
    w = measured(Additive(activation), derivative=derivative).matrix

    assert w[BETWEEN].max() < 1e-12
    assert w[INSIDE].min() > 1e-3
    grouping = group_features(w, 3)
    assert groups_of(grouping.partition.assignment(3)) == {tuple(g) for g in GROUPS}
    assert grouping.resolution == 1
    assert grouping.communities == 3
    assert grouping.modularity[2] == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize(("output", "centered"), [(nn.LogSoftmax, False), (nn.Softmax, True)])
def test_probabilities_mix_what_the_network_keeps_apart(output, centered):
    network = Additive(nn.GELU, output=output(dim=1))

    w = measured(network, derivative="hvp", centered=centered).matrix

    assert w[BETWEEN].min() > 1e-4


def test_centering_takes_the_normalizer_out_of_log_probabilities():
    log_probs = measured(Additive(nn.GELU, output=nn.LogSoftmax(dim=1)), derivative="hvp").matrix

    np.testing.assert_allclose(
        log_probs, measured(Additive(nn.GELU), derivative="hvp").matrix, atol=1e-12
    )


def test_a_linear_network_depends_on_no_pair():
    for derivative in ("fd", "hvp", "ablate"):
        w = measured(Additive(nn.Identity), 2, derivative=derivative).matrix
        assert w.max() < 1e-12


def test_exact_second_derivatives_of_rectifiers_have_no_information():
    network = Additive(nn.ReLU)

    of_logits = hessian(network, keyed_rows(1)[1][0])

    assert of_logits.abs().max() == 0
    with pytest.raises(ConfigError, match=r"none of the 9 features .*derivative=fd"):
        group_features(torch.zeros(9, 9), 3)


def test_hvp_refuses_a_rectifier_by_name():
    with pytest.raises(ConfigError, match=r"parts\.0\.1 \(ReLU\), parts\.1\.1") as e:
        measured(Additive(nn.ReLU), derivative="hvp")

    assert "choose derivative=fd" in str(e.value)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (torch.relu, "Relu"),
        (nn.functional.leaky_relu, "LeakyRelu"),
        (nn.functional.hardswish, "Hardswish"),
        (lambda x: nn.functional.max_pool1d(x[:, None], 3)[:, 0], "MaxPool"),
        (lambda x: nn.functional.max_pool2d(x.view(-1, 1, 3, 3), 2).flatten(1), "MaxPool"),
    ],
)
def test_hvp_sees_what_is_no_module(step, name):
    with pytest.raises(ConfigError, match=f"derivative=hvp does not support {name}"):
        measured(
            lambda x: step(x).sum(dim=1, keepdim=True) * torch.ones(1, 3).double(),
            1,
            derivative="hvp",
        )


def test_a_network_in_training_is_refused():
    with pytest.raises(ConfigError, match="frozen"):
        measured(Additive(nn.GELU).train())


def test_signs_estimate_the_sum_over_classes():
    network = Additive(nn.GELU, groups=[range(9)], classes=5)
    _, inputs = keyed_rows(16)
    each = torch.stack([hessian(network, x) for x in inputs])  # [N, K, d, d]
    exact = (each - each.mean(dim=1, keepdim=True)).square().sum(dim=1).mean(dim=0)

    estimate = measured(network, 16, derivative="hvp", draws=200, directions_per_pass=1800).matrix

    assert (estimate.square() - exact).norm() / exact.norm() < 0.05
    raw = measured(
        network, 16, derivative="hvp", draws=200, centered=False, directions_per_pass=1800
    )
    exact_raw = each.square().sum(dim=1).mean(dim=0)
    assert (raw.matrix.square() - exact_raw).norm() / exact_raw.norm() < 0.05


def test_ablation_sums_classes_exactly():
    def network(x):  # logits x0 x1 and -2 x0 x1, or 1.5 x0 x1 and -1.5 x0 x1 after centering
        return torch.stack([x[:, 0] * x[:, 1], -2 * x[:, 0] * x[:, 1]], dim=1)

    for centered, expected in [(True, math.sqrt(2 * 1.5**2)), (False, math.sqrt(1 + 4))]:
        w = measured(network, 3, table_probes(9), derivative="ablate", centered=centered).matrix
        assert w[0, 1].item() == pytest.approx(expected)
        assert w.sum().item() == pytest.approx(2 * expected)


def test_differences_become_the_exact_derivative_with_the_square_of_the_step():
    network = Additive(nn.GELU, groups=[range(9)])
    exact = measured(network, 4, derivative="hvp").matrix

    off = [(measured(network, 4, step=h).matrix - exact).norm().item() for h in (0.2, 0.1, 0.05)]

    assert off[0] / off[1] == pytest.approx(4, rel=0.1)
    assert off[1] / off[2] == pytest.approx(4, rel=0.1)
    assert off[2] < 1e-2 * exact.norm()


@pytest.mark.parametrize(("derivative", "checks"), [("fd", 1), ("hvp", 2), ("ablate", 1)])
def test_the_stated_number_of_inputs_is_what_the_network_receives(derivative, checks):
    rows, network = [], Additive(nn.GELU)
    network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))

    measured(network, 2, derivative=derivative, draws=3)

    assert sum(rows) == 2 * inputs_of_a_record(derivative, 9, 3) + checks


def test_units_of_a_table_do_not_matter():
    network, (keys, inputs) = Additive(nn.GELU), keyed_rows()
    unit = torch.logspace(-3, 3, 9, dtype=torch.float64)

    plain = table_probes(9).scale_amplitudes(feature_scales([inputs], table_probes(9)))
    other = table_probes(9).scale_amplitudes(feature_scales([inputs * unit], table_probes(9)))
    first = measure_dependency(network, [(keys, inputs)], plain)
    second = measure_dependency(lambda x: network(x / unit), [(keys, inputs * unit)], other)

    np.testing.assert_allclose(first.matrix, second.matrix, rtol=1e-9, atol=1e-12)


def test_order_batches_and_processes_change_nothing():
    network, (keys, inputs) = Additive(nn.GELU, groups=[range(9)]), keyed_rows()
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(3))
    moved = [keys[n] for n in order]

    whole = measured(network)
    parts = [
        measure_dependency(network, [(moved[a:b], inputs[order[a:b]])], table_probes(9))
        for a, b in ((0, 7), (7, 8), (8, 24))
    ]
    summed = parts[2] + (parts[0] + parts[1])

    np.testing.assert_allclose(summed.squares, whole.squares, rtol=1e-13, atol=0)
    assert torch.equal(summed.records, whole.records)
    assert summed.split_half == pytest.approx(whole.split_half, abs=1e-12)
    first, second = group_features(summed.matrix, 4), group_features(whole.matrix, 4)
    assert first.partition.sha256 == second.partition.sha256
    assert torch.equal(
        feature_scales([inputs], table_probes(9)),
        feature_scales(inputs[order].split(5), table_probes(9)),
    )


def test_two_halves_say_whether_there_are_enough_records():
    upper = torch.triu(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)), diagonal=1)
    same = DependencySums(
        squares=torch.stack([upper, 4 * upper]).double(), records=torch.tensor([3, 5])
    )
    opposite = DependencySums(
        squares=torch.stack([upper, upper.max() - upper]).double(), records=same.records
    )

    assert same.split_half == pytest.approx(1)
    assert not same.needs_more_records
    assert opposite.split_half == pytest.approx(-1)
    assert opposite.needs_more_records
    assert DependencySums.empty(6).needs_more_records

    network = Additive(nn.GELU, groups=[range(9)])
    assert measured(network, 4).split_half < measured(network, 96).split_half


def test_equal_values_share_their_rank():
    # Pearson's correlation of the ranks 1, 2.5, 2.5 and 1, 2, 3.
    halves = torch.zeros(2, 3, 3).double()
    for half, values in enumerate(([0.0, 1.0, 1.0], [1.0, 4.0, 9.0])):
        for (i, j), value in zip([(0, 1), (0, 2), (1, 2)], values, strict=True):
            halves[half, i, j] = halves[half, j, i] = value

    total = DependencySums(squares=halves, records=torch.tensor([1, 1]))

    assert total.split_half == pytest.approx(1.5 / math.sqrt(1.5 * 2))


# ---- images --------------------------------------------------------------------------------------


class Quadrants(Classifier):
    """Network for images [B, 3, 8, 8] that sums four networks, each of which reads the pixels of a quadrant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 3)) for _ in range(4)
        )

    @property
    def network(self):
        return self

    @property
    def head(self):
        return None

    def forward_trunk(self, images):
        return images, None

    def forward_head(self, features, context):
        halves = [half for rows in features.chunk(2, dim=2) for half in rows.chunk(2, dim=3)]
        return sum(part(half.flatten(1)) for part, half in zip(self.parts, halves, strict=True))


def keyed_images(number=8):
    generator = torch.Generator().manual_seed(0)
    return [f"image-{n}" for n in range(number)], torch.rand(number, 3, 8, 8, generator=generator)


QUADRANTS = {(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)}


@pytest.mark.parametrize("derivative", ["fd", "ablate"])
def test_the_quadrants_that_a_network_of_images_keeps_apart_are_found(derivative):
    model, (keys, pixels) = freeze(Quadrants()), keyed_images()
    probes = pixel_probes((8, 8), (4, 4))
    probes = probes.scale_amplitudes(feature_scales([pixels], probes))

    total = measure_dependency(
        lambda x: model(x).logits,
        [(keys, pixels)],
        probes,
        derivative=derivative,
        modules=model,
        directions_per_pass=5,
    )
    grouping = group_features(total.matrix, 4, grid=(4, 4))

    assert groups_of(grouping.partition.assignment(4)) == QUADRANTS
    assert grouping.partition.grid == (4, 4)


def test_a_head_that_averages_its_features_is_told_so():
    linear = freeze(nn.Linear(3, 5))
    keys, features = keyed_images(2)
    probes = pixel_probes((8, 8), (8, 8))

    total = measure_dependency(lambda x: linear(x.mean(dim=(2, 3))), [(keys, features)], probes)

    with pytest.raises(ConfigError, match=r"global average pooling .*, probe pixel blocks"):
        group_features(total.matrix, 2, grid=(8, 8))


def test_a_blocks_direction_is_gray_and_of_length_one():
    probes = pixel_probes((7, 8), (3, 4))

    for block in range(12):
        values = probes.amplitude[probes.feature_of == block]
        assert values.square().sum().item() == pytest.approx(1)
        assert values.unique().numel() == 1
    assert torch.equal(probes.feature_of[0], probes.feature_of[2])
    with pytest.raises(ValueError, match="at most one block per pixel"):
        pixel_probes((4, 4), (5, 4))
    with pytest.raises(ValueError, match="do not fit"):
        measured(Additive(nn.GELU), 1, probes)


# ---- explanations --------------------------------------------------------------------------------


def test_an_additive_networks_parts_are_its_shapley_values():
    network = Additive(nn.GELU, groups=[[0, 1], [2, 3], [4, 5], [6, 7, 8]])
    parts = network.explanations(keyed_rows()[1])
    mean = parts.mean(dim=0)

    def value(players):
        return sum(parts[0, m] if m in players else mean[m] for m in range(4))

    for m in range(4):
        others = [n for n in range(4) if n != m]
        shapley = sum(
            math.factorial(size)
            * math.factorial(3 - size)
            / math.factorial(4)
            * (value({*players, m}) - value(set(players)))
            for size in range(4)
            for players in itertools.combinations(others, size)
        )
        np.testing.assert_allclose(shapley, parts[0, m] - mean[m], rtol=0, atol=1e-14)
