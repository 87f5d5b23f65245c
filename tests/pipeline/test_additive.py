"""Additive networks: the sum of subnets that see one superfeature each, batched, with their partition inside."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pipeline.config.models import AdditiveModelConfig, CifarModelConfig
from pipeline.core.errors import ConfigError
from pipeline.models.additive.chimeras import mix_inputs, mix_rows, spread_cells
from pipeline.models.additive.hierarchy import coarsen, describe_partition, hierarchy_of
from pipeline.models.additive.network import network_partition
from pipeline.models.additive.partition import PARTITION_NAME, build_partition
from pipeline.models.cost import count_parameters, measure_cost
from pipeline.models.explainers.explain import EXPLAINERS
from pipeline.models.fingerprint import describe_teacher
from pipeline.models.output import Intermediates
from pipeline.models.providers import build_model, freeze
from pipeline.models.saved import TrainedModel, load_model, save_model
from pipeline.models.weights import load_weights

EACH = Intermediates(superfeatures=True)
NUM_CLASSES = 5
SIDE = 16
GRID = (4, 4)
M = 3
MLP = AdditiveModelConfig(name="mlp", superfeatures=M, grid=GRID, width=6, depth=3, input_size=SIDE)
TABLE = AdditiveModelConfig(name="mlp", superfeatures=M, columns=11, width=6, depth=2)
CONV = AdditiveModelConfig(name="conv", superfeatures=M, grid=GRID, width=4, depth=2)
TRUNK = AdditiveModelConfig(
    superfeatures=M, grid=GRID, width=6, depth=2, trunk="resnet8", trunk_width=4
)
NETWORKS = {"mlp": MLP, "table": TABLE, "conv": CONV, "trunk": TRUNK}
ON_IMAGES = [MLP, CONV, TRUNK]


def build(config, seed=0):
    torch.manual_seed(seed)
    model = freeze(build_model(replace(config, weights=None), NUM_CLASSES))
    for parameter in model.parameters():  # no bias may hide behind a zero
        parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def inputs_of(config, records=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (config.columns,) if config.columns else (3, SIDE, SIDE)
    return torch.rand(records, *shape, generator=generator)


def each_of(model, inputs):
    return model(inputs, EACH).superfeature_logits


def save_partition(folder, assignments):
    folder.mkdir(exist_ok=True)
    save_file({"assignments": assignments}, folder / PARTITION_NAME)
    return str(folder)


def scattered(config, most=None):
    """A partition that no block would give."""
    control = replace(
        config,
        superfeatures=most or config.superfeatures,
        partition_control="random",
        partition=None,
    )
    return build_partition(control).assignments


# ---- the sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_prediction_is_the_normalized_product_of_the_superfeatures(scale):
    generator = torch.Generator().manual_seed(0)
    each = scale * torch.randn(6, 4, 10, generator=generator, dtype=torch.float64)

    summed = each.sum(dim=1).log_softmax(dim=1)
    product = F.log_softmax(each, dim=2).sum(dim=1)  # log of prod_m q_m, not normalized

    assert summed.isfinite().all()
    assert (summed.exp() - product.softmax(dim=1)).abs().max() < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_superfeatures_that_sum_to_the_logits_of_a_plain_pass(name):
    config = NETWORKS[name]
    model = build(config)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(None))

    shown, plain = model(inputs_of(config), EACH), model(inputs_of(config))

    assert len(passes) == 2
    assert shown.superfeature_logits.shape == (4, M, NUM_CLASSES)
    assert shown.superfeature_hidden.shape == (4, M, config.width)
    assert torch.equal(shown.superfeature_logits.sum(dim=1), plain.logits)
    assert torch.equal(shown.features, plain.features)
    assert (plain.superfeature_logits, plain.superfeature_hidden) == (None, None)


def test_superfeatures_are_float32_in_a_half_precision_pass():
    for config in ON_IMAGES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = build(config)(inputs_of(config), EACH)

        assert output.superfeature_logits.dtype == output.logits.dtype == torch.float32


def test_a_shapley_value_is_the_superfeatures_logit_minus_its_mean():
    generator = torch.Generator().manual_seed(0)
    own, mean = torch.randn(2, 4, NUM_CLASSES, generator=generator, dtype=torch.float64)
    players = range(4)

    def value(coalition):
        return sum(own[m] if m in coalition else mean[m] for m in players)

    for m in players:
        others = [player for player in players if player != m]
        shapley = sum(
            math.factorial(size)
            * math.factorial(3 - size)
            / math.factorial(4)
            * (value({*coalition, m}) - value(coalition))
            for size in range(4)
            for coalition in itertools.combinations(others, size)
        )
        assert (shapley - (own[m] - mean[m])).abs().max() < 1e-14


# ---- who sees what -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_a_subnet_sees_nothing_outside_its_group(name, tmp_path):
    config = NETWORKS[name]
    config = replace(config, partition=save_partition(tmp_path / "p", scattered(config)))
    model = build(config)
    inputs = inputs_of(config).requires_grad_()
    assignment = network_partition(model).assignment(M)
    group = assignment if config.columns else spread_cells(assignment.view(GRID), (SIDE, SIDE))

    each = each_of(model, inputs)

    for m in range(M):
        (gradient,) = torch.autograd.grad(each[:, m].square().sum(), inputs, retain_graph=True)
        seen = gradient.abs().sum(dim=0 if config.columns else (0, 1))
        assert (seen[group != m] == 0).all()
        assert (seen[group == m] > 0).any()


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_removing_a_feature_changes_its_own_superfeature_alone(name):
    config = NETWORKS[name]
    model = build(config)
    whole, without = inputs_of(config), inputs_of(config)
    feature = 1
    if config.columns:
        without[:, feature] = 0
    else:
        without[:, :, :4, 4:8] = 0  # cell 1 of the first row
    own = int(network_partition(model).assignment(M)[feature])

    changed = (each_of(model, whole) != each_of(model, without)).flatten(2).any(dim=2).all(dim=0)

    assert changed.tolist() == [m == own for m in range(M)]


def test_a_head_sees_no_cells_but_its_own(tmp_path):
    config = replace(TRUNK, partition=save_partition(tmp_path / "p", scattered(TRUNK)))
    model = build(config)
    features = model(inputs_of(config)).features.detach().requires_grad_()
    assignment = network_partition(model).assignment(M)

    each = model.forward_superfeatures(features).logits

    for m in range(M):
        (gradient,) = torch.autograd.grad(each[:, m].square().sum(), features, retain_graph=True)
        cells = gradient.abs().sum(dim=(0, 1)).flatten()
        assert (cells[assignment != m] == 0).all()
        assert (cells[assignment == m] > 0).any()


def test_through_a_trunk_a_pixel_reaches_other_superfeatures():
    model = build(TRUNK)
    inputs = inputs_of(TRUNK).requires_grad_()

    (gradient,) = torch.autograd.grad(each_of(model, inputs)[:, 0].sum(), inputs)

    group = spread_cells(network_partition(model).assignment(M).view(GRID), (SIDE, SIDE))
    assert (gradient[:, :, group != 0] != 0).any()


# ---- batched subnets are separate ones -----------------------------------------------------------


def linear_of(layer, m):
    """One of M linear layers, by itself."""
    linear = nn.Linear(*layer.weight.shape[1:]).double()
    linear.weight.data, linear.bias.data = layer.weight[m].T, layer.bias[m]
    return linear


def tail_of(tail, m, x):
    for layer in tail.hidden:
        x = linear_of(layer, m)(x).relu()
    return linear_of(tail.output, m)(x)


@pytest.mark.parametrize("name", ["mlp", "table"])
def test_batched_perceptrons_equal_as_many_separate_ones(name):
    config = replace(NETWORKS[name], partition_control="random")
    model = build(config).double()
    inputs = inputs_of(config).double()
    features = inputs[:, :, None]
    if not config.columns:
        patches = model.normalize(inputs).unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 4, 4, 4, 4]
        features = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assignment = network_partition(model).assignment(M)

    for m, found in enumerate(each_of(model, inputs).unbind(dim=1)):
        own = features[:, assignment == m].flatten(1)
        hidden = own @ model.weight[assignment == m].flatten(0, 1) + model.bias[m]

        assert torch.allclose(found, tail_of(model.tail, m, hidden.relu()), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_grouped_convolutions_equal_as_many_networks_with_norms_of_their_own(training):
    model = build(CONV).double().train(training)
    images = inputs_of(CONV).double()
    group = spread_cells(network_partition(model).assignment(M).view(GRID), (SIDE, SIDE))

    for m, found in enumerate(each_of(model, images).unbind(dim=1)):
        x = model.normalize(images) * (group == m)
        for (conv, norm, _), stride in zip(model.convolutions, (1, 2), strict=True):
            own = slice(m * CONV.width, (m + 1) * CONV.width)
            x = F.conv2d(x, conv.weight[own], stride=stride, padding=1)
            alone = nn.BatchNorm2d(CONV.width).double().train(training)
            alone.weight.data, alone.bias.data = norm.weight[own], norm.bias[own]
            x = alone(x).relu()

        expected = tail_of(model.tail, m, x.mean(dim=(2, 3)))
        assert torch.allclose(found, expected, atol=1e-4 if not training else 1e-12)


def test_heads_equal_as_many_1x1_convolutions_with_a_masked_average():
    model = build(TRUNK).double()
    features = model(inputs_of(TRUNK).double()).features
    group = network_partition(model).assignment(M).view(GRID)

    for m, found in enumerate(model.forward_superfeatures(features).logits.unbind(dim=1)):
        weight = model.cells.weight[m].T[:, :, None, None]
        x = F.conv2d(features, weight, model.cells.bias[m]).relu()
        pooled = (x * (group == m)).sum(dim=(2, 3)) / (group == m).sum()

        assert torch.allclose(found, tail_of(model.tail, m, pooled), atol=1e-12)


# ---- levels and chimeras -------------------------------------------------------------------------


def test_coarsened_superfeatures_are_group_sums_down_to_the_logits():
    model = build(replace(MLP, superfeatures=7))
    output = model(inputs_of(MLP), EACH)
    partition = network_partition(model)
    hierarchy = hierarchy_of(partition)
    fine = output.superfeature_logits

    for number in range(1, 8):
        coarse = coarsen(fine, hierarchy.coarsening(number), number)
        for group in range(number):
            members = partition.assignment(7)[partition.assignment(number) == group].unique()
            assert torch.allclose(coarse[:, group], fine[:, members].sum(dim=1), atol=1e-6)

    assert torch.allclose(coarsen(fine, hierarchy.coarsening(1), 1)[:, 0], output.logits, atol=1e-6)
    assert torch.equal(coarsen(fine, hierarchy.coarsening(7), 7), fine)
    assert coarsen(fine.half(), hierarchy.coarsening(2), 2).dtype == torch.float32


DONORS = torch.tensor([[0, 1, 2], [3, 3, 0], [2, 2, 2]])


def chimeras_of(model, inputs):
    partition = network_partition(model)
    each = each_of(model, inputs)
    mixed = mix_inputs(inputs, partition.assignment(M), DONORS, partition.grid)
    return mixed, mix_rows(each, DONORS)


@pytest.mark.parametrize("name", ["mlp", "table", "conv"])
def test_a_chimera_has_its_donors_superfeatures_exactly(name):
    model = build(replace(NETWORKS[name], partition_control="random"))
    inputs = inputs_of(NETWORKS[name])

    mixed, promised = chimeras_of(model, inputs)

    assert torch.equal(mixed[2], inputs[2])
    assert not torch.equal(mixed[0], inputs[0])
    assert torch.allclose(each_of(model, mixed), promised, atol=1e-6)


def test_through_a_trunk_a_chimera_of_pixels_is_not_the_sum_of_its_donors():
    model = build(TRUNK)

    mixed, promised = chimeras_of(model, inputs_of(TRUNK))

    difference = (each_of(model, mixed) - promised).abs().flatten(1)
    assert difference[:2].max() > 1e-3
    assert difference[2].max() < 1e-5  # one donor


# ---- the partition -------------------------------------------------------------------------------


def test_four_blocks_of_a_square_are_its_quarters():
    partition = build_partition(replace(CONV, superfeatures=4))

    assert partition.assignment(4).view(GRID).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]


def test_controls_keep_the_sizes_of_groups_or_their_number(tmp_path):
    found = scattered(CONV, most=6)
    config = replace(CONV, superfeatures=6, partition=save_partition(tmp_path / "p", found))

    def assignments(**options):
        return build_partition(replace(config, **options)).assignments

    random = assignments(partition_control="random")
    assert torch.equal(assignments(), found)
    assert not torch.equal(random, found)
    assert torch.equal(random, assignments(partition_control="random"))
    assert not torch.equal(random, assignments(partition_control="random", partition_seed=1))
    for level in range(6):
        assert torch.equal(random[level].bincount(), found[level].bincount())
    blocks = build_partition(replace(config, partition=None)).assignments
    assert torch.equal(assignments(partition_control="contiguous"), blocks)


def test_a_partition_is_read_from_a_folder_or_a_file_down_to_the_level_that_is_wanted(tmp_path):
    found = scattered(CONV, most=6)
    folder = save_partition(tmp_path / "p", found)

    for path in (folder, f"{folder}/{PARTITION_NAME}"):
        assert torch.equal(build_partition(replace(CONV, partition=path)).assignments, found[:M])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_saved_run_is_rebuilt_without_the_partitions_file(name, tmp_path):
    config = NETWORKS[name]
    path = tmp_path / "p"
    config = replace(config, partition=save_partition(path, scattered(config)))
    model = build(config)
    save_model(
        tmp_path,
        model,
        TrainedModel(config=config, num_classes=NUM_CLASSES, input_size=(SIDE, SIDE)),
    )
    (path / PARTITION_NAME).unlink()

    loaded, _ = load_model(tmp_path)

    assert torch.equal(network_partition(loaded).assignments, scattered(config))
    assert torch.equal(loaded(inputs_of(config)).logits, model(inputs_of(config)).logits)


def test_weights_bring_their_own_partition(tmp_path):
    teacher = build(replace(MLP, partition_control="random"))
    save_file(teacher.state_dict(), tmp_path / "w.safetensors")
    other = build_model(
        replace(MLP, partition="gone", weights=str(tmp_path / "w.safetensors")), NUM_CLASSES
    )
    assert torch.equal(network_partition(other).assignments, teacher.assignments)
    other = build(MLP)
    assert not torch.equal(network_partition(other).assignments, teacher.assignments)

    load_weights(other, tmp_path / "w.safetensors")

    assert torch.equal(other(inputs_of(MLP)).logits, teacher(inputs_of(MLP)).logits)


def test_where_a_partition_came_from_is_not_part_of_a_teachers_fingerprint(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(build(MLP).state_dict(), weights)
    named = replace(MLP, weights=str(weights))
    elsewhere = replace(named, partition="gone", partition_control="random", partition_seed=2)

    assert describe_teacher(named, NUM_CLASSES) == describe_teacher(elsewhere, NUM_CLASSES)
    assert describe_teacher(named, NUM_CLASSES)["architecture"]["superfeatures"] == M


# ---- explanations and cost -----------------------------------------------------------------------


@pytest.mark.parametrize("config", ON_IMAGES, ids=lambda config: config.name)
def test_contributions_sum_to_the_class_centered_logit(config):
    model = build(config)
    output = model(inputs_of(config))
    classes = torch.tensor([[0, 3], [1, -1], [2, 4], [0, 1]])

    maps = EXPLAINERS["superfeatures"](model, output, classes)

    centered = output.logits - output.logits.mean(dim=1, keepdim=True)
    expected = centered.gather(1, classes.clamp(min=0)) * (classes >= 0)
    assert maps.shape == (4, 2, 1, *GRID)
    assert torch.allclose(maps.sum(dim=(2, 3, 4)), expected, atol=1e-5)


def test_a_trunk_is_explained_by_gradcam():
    model = build(TRUNK)
    output = model(inputs_of(TRUNK))
    features = output.features.detach().requires_grad_()
    score = model.forward_head(features, None)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, features)

    maps = EXPLAINERS["gradcam"](model, output, torch.ones(4, 1, dtype=torch.int64))

    alpha = gradient.mean(dim=(2, 3), keepdim=True)
    expected = (alpha * features).sum(dim=1).relu()
    assert model.explainer == "gradcam"
    assert torch.allclose(maps[:, 0, 0], expected, atol=1e-5)


def test_cost_counts_parameters_exactly_and_products_once():
    model = build(AdditiveModelConfig(name="mlp", superfeatures=4, columns=8, width=3, depth=2))

    cost = measure_cost(model, torch.rand(1, 8))

    assert cost.parameters == count_parameters(model) == (8 * 3 + 4 * 3) + 4 * (3 * 3 + 3) + 4 * 20
    assert cost.macs == 8 * 3 + 4 * 3 * 3 + 4 * 3 * NUM_CLASSES
    convolution = build(replace(CONV, superfeatures=2, depth=1))
    macs = SIDE * SIDE * 2 * 4 * 3 * 9 + 2 * 4 * NUM_CLASSES
    assert measure_cost(convolution, torch.rand(1, 3, SIDE, SIDE)).macs == macs


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"superfeatures": 17}, r"superfeatures=17 of 16 features.*finer grid"),
        ({"width": 0}, r"width must be >= 1, got 0"),
        ({"name": "conv", "columns": 3}, r"columns=3 is an option of name=mlp.*leave it null"),
        ({"name": "mlp", "input_size": 18}, r"does not divide input_size=18; choose a divisor"),
        ({"trunk": "resnet9"}, r"resnet8, resnet14"),
        ({"weights": "pretrained"}, r"weights=pretrained.*train one with stages.teach"),
    ],
)
def test_options_that_make_no_network_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AdditiveModelConfig(**{"grid": GRID, **options})


def test_a_perceptron_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"name=mlp.*set input_size.*columns of a table"):
        build_model(replace(MLP, input_size=None), NUM_CLASSES)


def test_a_partition_that_is_missing_or_does_not_fit_is_refused(tmp_path):
    folder = save_partition(tmp_path / "p", scattered(CONV))
    for options, message in (
        ({"partition": str(tmp_path / "gone")}, r"partition=.*gone holds no partition.safetensors"),
        ({"partition": folder, "grid": (2, 4)}, r"groups 16 features.*has 8: set grid="),
        ({"partition": folder, "superfeatures": 5}, r"up to 3 superfeatures.*lower it"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(replace(CONV, **options), NUM_CLASSES)
    save_file({"other": torch.zeros(1)}, tmp_path / "p" / PARTITION_NAME)
    with pytest.raises(ConfigError, match=r"no i64 tensor `assignments`"):
        build_model(replace(CONV, partition=folder), NUM_CLASSES)


def test_inputs_of_another_shape_are_refused():
    for config, shape, message in (
        (MLP, (1, 3, 32, 32), r"AdditiveMlp takes images of 16x16.*augment.size"),
        (TABLE, (1, 3), r"columns=11 takes rows.*set columns"),
        (CONV, (1, 3, 18, 18), r"grid=\[4, 4\] does not divide an input of 18x18.*augment.size"),
        (TRUNK, (1, 3, 32, 32), r"must be that of its last stage, 8x8.*set grid=\[8,8\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(config)(torch.zeros(shape))


def test_networks_without_superfeatures_or_features_say_what_to_choose():
    plain = freeze(build_model(CifarModelConfig(name="resnet8", width=2), NUM_CLASSES))
    images = torch.rand(1, 3, SIDE, SIDE)
    one = torch.zeros(1, 1, dtype=torch.int64)

    with pytest.raises(ConfigError, match=r"CifarResNet has no superfeatures.*student=additive"):
        plain(images, EACH)
    with pytest.raises(ConfigError, match=r"CifarResNet has no superfeatures.*teacher=additive"):
        network_partition(plain)
    with pytest.raises(ConfigError, match=r"CifarResNet; set explainer=gradcam"):
        EXPLAINERS["superfeatures"](plain, plain(images), one)
    for config in (MLP, CONV):
        model = build(config)
        with pytest.raises(ConfigError, match=r"set explainer=superfeatures"):
            EXPLAINERS["gradcam"](model, model(images), one)


def test_the_hierarchy_is_plain_values():
    described = describe_partition(build_partition(replace(CONV, superfeatures=4)))

    assert [level["coarsening"] for level in described["hierarchy"]][:2] == [
        [0, 0, 0, 0],
        [0, 1, 0, 1],
    ]
    assert np.unique([level["sha256"] for level in described["hierarchy"]]).size == 4
