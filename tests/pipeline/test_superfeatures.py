"""Superfeatures: what depends on what in networks that are additive by construction, and the groups it gives."""

import base64
import io
import itertools
import logging
import math

import networkx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.models.additive.partition import contiguous_partition, random_partition
from pipeline.models.classifier import Classifier
from pipeline.models.providers import freeze
from pipeline.report.superfeatures import (
    dependency_picture,
    group_picture,
    superfeature_figure,
)
from pipeline.store.lock import LOCK_NAME
from pipeline.store.manifest import ManifestError
from pipeline.training.superfeatures.artifact import (
    load_partition,
    partition_artifact,
    save_partition,
)
from pipeline.training.superfeatures.dependency import DependencySums, measure_dependency, symmetric
from pipeline.training.superfeatures.grouping import group_features, sparsify
from pipeline.training.superfeatures.probes import (
    cell_probes,
    feature_scales,
    pixel_probes,
    table_probes,
)

GROUPS = ([0, 3, 6], [1, 4, 7], [2, 5, 8])
INSIDE = torch.zeros(9, 9, dtype=torch.bool)
for members in GROUPS:
    INSIDE[np.ix_(members, members)] = True
BETWEEN = ~INSIDE
INSIDE.fill_diagonal_(False)


class Additive(nn.Module):
    """Logits [B, K] as a sum of networks that read a group of a table's columns each."""

    def __init__(self, activation, groups=GROUPS, classes=4, output=None):
        super().__init__()
        torch.manual_seed(1)
        self.groups = [list(group) for group in groups]
        self.output = output or (lambda logits: logits)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(len(g), 16), activation(), nn.Linear(16, classes))
            for g in groups
        )
        freeze(self.double())

    def explanations(self, inputs):  # [B, M, K]
        return torch.stack(
            [part(inputs[:, g]) for g, part in zip(self.groups, self.parts, strict=True)], dim=1
        )

    def forward(self, inputs):
        return self.output(self.explanations(inputs).sum(dim=1))


def records(number=24, width=9, seed=0):
    inputs = torch.randn(number, width, generator=torch.Generator().manual_seed(seed)).double()
    return [f"record-{n}" for n in range(number)], inputs


def measured(network, number=24, probes=None, **options):
    return measure_dependency(network, [records(number)], probes or table_probes(9), **options)


def hessian(network, record):
    """Of each logit, [K, d, d], one by one."""
    num_classes = network(record[None]).shape[1]
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda x, c=c: network(x[None])[0, c], record)
            for c in range(num_classes)
        ]
    )


def groups_of(assignment):
    return {
        tuple(torch.nonzero(assignment == group).flatten().tolist())
        for group in assignment.unique()
    }


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

    of_logits = hessian(network, records(1)[1][0])

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
    with pytest.raises(ConfigError, match=f"derivative=hvp: {name}"):
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
    _, inputs = records(16)
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
    def network(x):  # logits x0 x1 and -2 x0 x1, whose centered ones are 1.5 x0 x1 and -1.5 x0 x1
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


def test_units_of_a_table_do_not_matter():
    network, (keys, inputs) = Additive(nn.GELU), records()
    unit = torch.logspace(-3, 3, 9, dtype=torch.float64)

    plain = table_probes(9).scale_amplitudes(feature_scales([inputs], table_probes(9)))
    other = table_probes(9).scale_amplitudes(feature_scales([inputs * unit], table_probes(9)))
    first = measure_dependency(network, [(keys, inputs)], plain)
    second = measure_dependency(lambda x: network(x / unit), [(keys, inputs * unit)], other)

    np.testing.assert_allclose(first.matrix, second.matrix, rtol=1e-9, atol=1e-12)


def test_order_batches_and_processes_change_nothing():
    network, (keys, inputs) = Additive(nn.GELU, groups=[range(9)]), records()
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
    # Ranks 1, 2.5, 2.5 against 1, 2, 3: Pearson's correlation of them by hand.
    halves = torch.zeros(2, 3, 3).double()
    for half, values in enumerate(([0.0, 1.0, 1.0], [1.0, 4.0, 9.0])):
        for (i, j), value in zip([(0, 1), (0, 2), (1, 2)], values, strict=True):
            halves[half, i, j] = halves[half, j, i] = value

    total = DependencySums(squares=halves, records=torch.tensor([1, 1]))

    assert total.split_half == pytest.approx(1.5 / math.sqrt(1.5 * 2))


# ---- images and trunks ---------------------------------------------------------------------------


class Quadrants(Classifier):
    """Images [B, 3, 8, 8] -> a sum of four networks, each of which reads a quadrant's pixels."""

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


def images(number=8):
    generator = torch.Generator().manual_seed(0)
    return [f"image-{n}" for n in range(number)], torch.rand(number, 3, 8, 8, generator=generator)


QUADRANTS = {(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)}


@pytest.mark.parametrize("derivative", ["fd", "ablate"])
def test_the_quadrants_that_a_network_of_images_keeps_apart_are_found(derivative):
    model, (keys, pixels) = freeze(Quadrants()), images()
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
    grouping = group_features(total.matrix, 4, grid=probes.grid)

    assert groups_of(grouping.partition.assignment(4)) == QUADRANTS
    assert grouping.partition.grid == (4, 4)


def test_the_cells_of_a_trunk_are_probed_along_their_own_activation():
    model, (keys, features) = freeze(Quadrants().double()), images()

    total = measure_dependency(
        lambda x: model.forward_head(x, None), [(keys, features.double())], cell_probes(3, (8, 8))
    )

    cell = torch.arange(64).view(8, 8)
    w = total.matrix
    assert w[cell[:4, :4].flatten()][:, cell[:4, 4:].flatten()].max() < 1e-12
    assert w[0, 1] > 0
    quiet = features.double().clone()
    quiet[:, :, 0, 0] = 0  # a cell that is silent has no direction
    w = measure_dependency(
        lambda x: model.forward_head(x, None), [(keys, quiet)], cell_probes(3, (8, 8))
    ).matrix
    assert w[0].max() == w[:, 0].max() == 0


def test_a_head_that_averages_its_features_is_told_so():
    linear = freeze(nn.Linear(3, 5))
    keys, features = images(2)

    total = measure_dependency(
        lambda x: linear(x.mean(dim=(2, 3))), [(keys, features)], cell_probes(3, (8, 8))
    )

    with pytest.raises(ConfigError, match=r"global average pooling \(probe pixel blocks"):
        group_features(total.matrix, 2, grid=(8, 8))


def test_a_blocks_direction_is_gray_and_of_length_one():
    probes = pixel_probes((7, 8), (3, 4))

    for block in range(12):
        values = probes.amplitude[probes.feature_of == block]
        assert values.square().sum().item() == pytest.approx(1)
        assert values.unique().numel() == 1
    assert torch.equal(probes.feature_of[0], probes.feature_of[2])
    with pytest.raises(ValueError, match="at most one a pixel"):
        pixel_probes((4, 4), (5, 4))
    with pytest.raises(ValueError, match="do not fit"):
        measured(Additive(nn.GELU), 1, probes)


# ---- explanations --------------------------------------------------------------------------------


def test_an_additive_networks_parts_are_its_shapley_values():
    network = Additive(nn.GELU, groups=[[0, 1], [2, 3], [4, 5], [6, 7, 8]])
    parts = network.explanations(records()[1])
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


# ---- grouping ------------------------------------------------------------------------------------


def dense(features=20, seed=0):
    weights = torch.rand(features, features, generator=torch.Generator().manual_seed(seed)).double()
    return weights + weights.T


def is_nested(partition):
    return all(
        len({(int(f), int(c)) for f, c in zip(fine, coarse, strict=True)}) == len(fine.unique())
        for coarse, fine in itertools.pairwise(partition.assignments)
    )


def test_a_partition_covers_every_feature_once_and_is_nested():
    grouping = group_features(dense(), 8)

    assert grouping.partition.most == 8
    for number, assignment in enumerate(grouping.partition.assignments, start=1):
        assert assignment.shape == (20,)
        assert torch.equal(assignment.unique(), torch.arange(number))
    assert is_nested(grouping.partition)
    assert grouping.communities >= 8
    assert grouping.modularity[0] == pytest.approx(0)


def test_grouping_depends_on_the_matrix_and_the_seed_alone():
    first = group_features(dense(), 6, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        np.random.seed(99)
        again = group_features(1e6 * dense() + torch.eye(20), 6, seed=3)

    assert again.partition.sha256 == first.partition.sha256
    assert again.modularity == pytest.approx(first.modularity)


def test_the_merger_of_largest_gain_comes_first():
    weights = torch.zeros(8, 8).double()
    for a, b, weight in [
        (0, 1, 9),
        (2, 3, 9),
        (4, 5, 9),
        (6, 7, 9),
        (2, 4, 3),
        (0, 6, 2),
        (1, 3, 1),
    ]:
        weights[a, b] = weights[b, a] = weight

    partition = group_features(weights, 4, resolution=1.6).partition

    pairs = {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert groups_of(partition.assignment(4)) == pairs
    assert groups_of(partition.assignment(3)) == {(0, 1), (2, 3, 4, 5), (6, 7)}
    assert groups_of(partition.assignment(2)) == {(0, 1, 6, 7), (2, 3, 4, 5)}


def test_modularity_is_that_of_the_library():
    weights = dense(12).fill_diagonal_(0)
    grouping = group_features(weights, 3, neighbors=4)
    graph = networkx.from_numpy_array(sparsify(weights.numpy(), 4))

    for number, found in enumerate(grouping.modularity, start=1):
        sets = groups_of(grouping.partition.assignment(number))
        assert found == pytest.approx(networkx.community.modularity(graph, sets))


def test_a_null_feature_makes_no_group_of_its_own():
    network, (keys, inputs) = Additive(nn.GELU), records()
    # Columns 9 and 10 are not read; 9 is a copy of column 4, and 10 is constant.
    inputs = torch.cat([inputs, -inputs[:, 4:5], torch.ones(24, 1)], dim=1)
    total = measure_dependency(lambda x: network(x[:, :9]), [(keys, inputs)], table_probes(11))
    with np.errstate(invalid="ignore"):
        correlation = torch.corrcoef(inputs.T)

    grouping = group_features(total.matrix, 3, correlation=correlation)

    assert grouping.null_features == (9, 10)
    assert groups_of(grouping.partition.assignment(3)) == {(0, 3, 6, 10), (1, 4, 7, 9), (2, 5, 8)}
    with pytest.raises(ValueError, match=r"features \[9, 10\] of the table"):
        group_features(total.matrix, 3)
    with pytest.raises(ConfigError, match="choose 1 to 9"):
        group_features(total.matrix, 10, correlation=correlation)


def test_a_null_cell_joins_its_neighbors():
    weights = torch.zeros(12, 12).double()  # 3 x 4, the middle row is dead
    for a, b in [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (8, 9), (9, 10), (10, 11), (8, 10)]:
        weights[a, b] = weights[b, a] = 1

    grouping = group_features(weights, 2, grid=(3, 4))

    assert grouping.null_features == (4, 5, 6, 7)
    assert groups_of(grouping.partition.assignment(2)) == {tuple(range(8)), (8, 9, 10, 11)}


def test_every_node_keeps_its_strongest_edges():
    weights = np.array([[0, 3, 2, 1.0], [3, 0, 2, 1], [2, 2, 0, 1], [1, 1, 1, 0]])

    kept = sparsify(weights, 1)

    # Of equal edges that to the lowest node: 2 keeps 0, 3 keeps 0.
    assert sorted(map(tuple, np.argwhere(np.triu(kept)).tolist())) == [(0, 1), (0, 2), (0, 3)]
    assert np.array_equal(kept, kept.T)
    assert group_features(dense(64), 3).neighbors == 8
    assert group_features(dense(20), 3).neighbors == 4


def test_more_superfeatures_than_communities_raise_the_resolution():
    grouping = group_features(dense(24), 12)

    assert grouping.resolution > 1
    assert math.log(grouping.resolution, 1.25) == pytest.approx(
        round(math.log(grouping.resolution, 1.25))
    )


def test_groups_of_very_unequal_sizes_are_warned_of(caplog):
    weights = torch.zeros(40, 40).double()
    weights[:38, :38] = 1
    weights[38, 39] = weights[39, 38] = 1
    with caplog.at_level(logging.WARNING, logger="permafrost.superfeatures"):
        group_features(weights, 2)

    assert "1 of 2 superfeatures have fewer than 2.5 features (2)" in caplog.text


# ---- controls ------------------------------------------------------------------------------------


def test_a_random_partition_has_the_sizes_of_the_one_it_controls():
    like = group_features(dense(), 6).partition

    control = random_partition(like, seed=1)

    for number in range(1, 7):
        sizes = [torch.bincount(p.assignment(number)).tolist() for p in (like, control)]
        assert sizes[0] == sizes[1]
    assert is_nested(control)
    assert groups_of(control.assignment(6)) != groups_of(like.assignment(6))
    assert random_partition(like, seed=1).sha256 == control.sha256
    assert random_partition(like, seed=2).sha256 != control.sha256


def test_a_contiguous_partition_is_of_rectangles():
    control = contiguous_partition(8, 32, grid=(4, 8))

    assert is_nested(control)
    for number in range(1, 9):
        picture = control.assignment(number).view(4, 8)
        for group in range(number):
            rows, columns = torch.nonzero(picture == group, as_tuple=True)
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert area == len(rows)
    assert torch.bincount(control.assignment(8)).tolist() == [4] * 8
    assert groups_of(control.assignment(2)) == groups_of(torch.arange(32) % 8 // 4)


def test_a_contiguous_partition_of_a_table_is_of_runs():
    control = contiguous_partition(3, 10)

    assert control.assignment(3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert control.grid is None


# ---- on disk -------------------------------------------------------------------------------------

MADE_FROM = {"teacher": {"weights_sha256": "ab" * 32}, "records": 24}
OPTIONS = {"derivative": "fd", "number": 3, "grid": [3, 3]}


@pytest.fixture
def kept(tmp_path):
    total = measured(Additive(nn.GELU))
    grouping = group_features(total.matrix, 3, grid=(3, 3))
    artifact = partition_artifact(tmp_path, MADE_FROM, OPTIONS)
    save_partition(artifact, grouping, total)
    return artifact.folder, grouping, total


def test_a_partition_on_disk_is_the_one_that_was_saved(kept, tmp_path):
    folder, grouping, total = kept

    loaded = load_partition(folder)

    assert folder == partition_artifact(tmp_path, MADE_FROM, OPTIONS).folder
    assert folder.parent == tmp_path / "artifacts"
    assert (
        folder != partition_artifact(tmp_path, MADE_FROM, OPTIONS | {"derivative": "ablate"}).folder
    )
    assert loaded.partition.sha256 == grouping.partition.sha256 == loaded.facts.partition_sha256
    assert torch.equal(loaded.dependency, total.matrix)
    assert loaded.partition.grid == (3, 3)
    facts = loaded.facts
    assert (facts.records, facts.seed, facts.neighbors) == (24, 0, 4)
    assert facts.modularity == grouping.modularity
    assert facts.split_half == pytest.approx(total.split_half)
    named = {p.name for p in folder.iterdir()} - {LOCK_NAME}
    assert named == {"manifest.json", "partition.safetensors"}


def test_a_partition_that_is_there_stays(kept, tmp_path):
    folder, grouping, total = kept
    before = (folder / "manifest.json").read_bytes()

    other = group_features(total.matrix, 2)
    save_partition(partition_artifact(tmp_path, MADE_FROM, OPTIONS), other, total)

    assert (folder / "manifest.json").read_bytes() == before
    assert load_partition(folder).partition.sha256 == grouping.partition.sha256


def test_an_interrupted_save_is_no_partition(kept):
    folder, _, _ = kept
    (folder / "manifest.json").unlink()

    with pytest.raises(ManifestError, match="does not exist"):
        load_partition(folder)


@pytest.mark.parametrize("name", ["partition.safetensors", "manifest.json"])
def test_any_flipped_byte_of_a_partition_is_found(kept, name):
    folder, _, _ = kept
    whole = (folder / name).read_bytes()

    for place in np.linspace(2, len(whole) - 3, 12).astype(int):
        (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ManifestError, match="damaged"):
            load_partition(folder)

    (folder / name).write_bytes(whole)
    load_partition(folder)


# ---- pictures ------------------------------------------------------------------------------------


def test_groups_have_colors_of_their_own():
    assignment = torch.arange(16).view(4, 4).flatten().numpy() // 2

    colors = group_picture(assignment, (4, 4)).reshape(16, 3)

    for a, b in itertools.combinations(range(16), 2):
        apart = np.abs(colors[a] - colors[b]).max()
        assert apart == 0 if assignment[a] == assignment[b] else apart > 0.1


def test_groups_lie_over_the_image():
    assignment = np.array([0, 1, 1, 0])
    image = np.zeros((6, 6, 3), dtype=np.uint8)
    image[:3] = 255

    picture = group_picture(assignment, (2, 2), image)

    assert picture.shape == (6, 6, 3)
    assert np.ptp(picture[:3, :3], axis=(0, 1)).max() == 0
    assert picture[0, 0] == pytest.approx(picture[5, 5] + 0.4)  # the same group, white and black
    assert np.abs(picture[0, 0] - picture[0, 5]).max() > 0.1


def test_the_matrix_is_shown_in_blocks():
    w = measured(Additive(nn.GELU)).matrix
    assignment = np.arange(9) % 3

    picture = dependency_picture(w, assignment)

    ink = np.where(np.ptp(picture, axis=2) > 0, 0, 1 - picture.mean(axis=2))  # without red lines
    third = len(ink) // 3
    assert ink[:third, :third].mean() > 0.1
    assert ink[: third - 2, third + 2 : 2 * third].max() < 1e-12
    assert (np.ptp(picture, axis=2) > 0).any(axis=1).all()


@pytest.mark.parametrize("grid", [(3, 3), None])
def test_the_figure_is_a_png(grid):
    w = measured(Additive(nn.GELU)).matrix

    uri = superfeature_figure(group_features(w, 3, grid=grid).partition, w)

    kind, content = uri.split(",")
    assert kind == "data:image/png;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    for color in group_picture(np.arange(3), None)[0]:
        assert (np.abs(pixels - 255 * color).max(axis=2) <= 2).sum() > 100


def test_symmetric_leaves_out_own_curvature():
    matrix = torch.tensor([[5.0, 1.0], [3.0, 7.0]])

    assert symmetric(matrix).tolist() == [[0, 2], [2, 0]]


# ---- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 4, 7])
def test_the_groups_at_m_do_not_depend_on_the_levels_above(number):
    alone = group_features(dense(24), number)

    for levels in (number, number + 1, 16, 24):
        deeper = group_features(dense(24), number, levels=levels)
        assert deeper.partition.most == levels
        assert torch.equal(deeper.partition.assignments[:number], alone.partition.assignments)
        assert deeper.modularity[:number] == alone.modularity
        assert (deeper.resolution, deeper.communities) == (alone.resolution, alone.communities)
        assert is_nested(deeper.partition)
        for finer, assignment in enumerate(deeper.partition.assignments, start=1):
            assert torch.equal(assignment.unique(), torch.arange(finer))


def test_planted_groups_are_found_at_their_own_number_and_lost_from_sixteen_down():
    """Noise hides 4 groups of 5: asked for as 4 they come back whole, however many levels lie above."""
    planted = torch.arange(20) // 5
    weights = 1.0 + 0.9 * (planted[:, None] == planted) + 0.6 * dense(20, seed=3)

    found = group_features(weights, 4, levels=16).partition.assignment(4)

    assert groups_of(found) == groups_of(planted)
