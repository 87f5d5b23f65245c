"""Additive networks: partition, explanations, cost and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from permafrost.config.models import CifarModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.cost import count_parameters, measure_cost
from permafrost.models.explanations import explainer_named
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.models.weights import load_weights
from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.ked.partition import PARTITION_NAME, build_partition, describe_partition
from tests.support.additive import (
    CONV,
    GRID,
    MLP,
    NETWORKS,
    NUM_CLASSES,
    ON_IMAGES,
    SIDE,
    TABLE,
    TRUNK,
    M,
    additive_model,
    inputs_of,
    save_partition,
    scattered,
)


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
    model = additive_model(config)
    size = tuple(inputs_of(config).shape[-2:])
    save_model(
        tmp_path, model, TrainedModel(config=config, num_classes=NUM_CLASSES, input_size=size)
    )
    (path / PARTITION_NAME).unlink()

    loaded, _ = SavedNetwork(tmp_path).load()

    assert torch.equal(network_partition(loaded).assignments, scattered(config))
    assert torch.equal(loaded(inputs_of(config)).logits, model(inputs_of(config)).logits)


def test_weights_bring_their_own_partition(tmp_path):
    teacher = additive_model(replace(MLP, partition_control="random"))
    save_file(teacher.state_dict(), tmp_path / "w.safetensors")
    other = build_model(
        replace(MLP, partition="gone", weights=str(tmp_path / "w.safetensors")), NUM_CLASSES
    )
    assert torch.equal(network_partition(other).assignments, teacher.assignments)
    other = additive_model(MLP)
    assert not torch.equal(network_partition(other).assignments, teacher.assignments)

    load_weights(other, tmp_path / "w.safetensors")

    assert torch.equal(other(inputs_of(MLP)).logits, teacher(inputs_of(MLP)).logits)


def test_where_a_partition_came_from_is_not_part_of_a_teachers_fingerprint(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(additive_model(MLP).state_dict(), weights)
    named = replace(MLP, weights=str(weights))
    elsewhere = replace(named, partition="gone", partition_control="random", partition_seed=2)

    assert Network(named, NUM_CLASSES).describe() == Network(elsewhere, NUM_CLASSES).describe()
    assert Network(named, NUM_CLASSES).describe()["architecture"]["superfeatures"] == M


@pytest.mark.parametrize("config", ON_IMAGES, ids=lambda config: config.name)
def test_contributions_sum_to_the_class_centered_logit(config):
    model = additive_model(config)
    output = model(inputs_of(config))
    classes = torch.tensor([[0, 3], [1, -1], [2, 4], [0, 1]])

    maps = explainer_named("superfeatures")(model, output, classes)

    centered = output.logits - output.logits.mean(dim=1, keepdim=True)
    expected = centered.gather(1, classes.clamp(min=0)) * (classes >= 0)
    assert maps.shape == (4, 2, 1, *GRID)
    assert torch.allclose(maps.sum(dim=(2, 3, 4)), expected, atol=1e-5)


def test_a_trunk_is_explained_by_gradcam():
    model = additive_model(TRUNK)
    output = model(inputs_of(TRUNK))
    features = output.features.detach().requires_grad_()
    score = model.forward_head(features, None)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, features)

    maps = explainer_named("gradcam")(model, output, torch.ones(4, 1, dtype=torch.int64))

    alpha = gradient.mean(dim=(2, 3), keepdim=True)
    expected = (alpha * features).sum(dim=1).relu()
    assert model.explainer == "gradcam"
    assert torch.allclose(maps[:, 0, 0], expected, atol=1e-5)


def test_cost_counts_parameters_exactly_and_products_once():
    model = additive_model(
        AdditiveModelConfig(name="mlp", superfeatures=4, columns=8, width=3, depth=2)
    )

    cost = measure_cost(model, torch.rand(1, 8))

    assert cost.parameters == count_parameters(model) == (8 * 3 + 4 * 3) + 4 * (3 * 3 + 3) + 4 * 20
    assert cost.macs == 8 * 3 + 4 * 3 * 3 + 4 * 3 * NUM_CLASSES
    convolution = additive_model(replace(CONV, superfeatures=2, depth=1))
    macs = SIDE * SIDE * 2 * 4 * 3 * 9 + 2 * 4 * NUM_CLASSES
    assert measure_cost(convolution, torch.rand(1, 3, SIDE, SIDE)).macs == macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"superfeatures": 17}, r"superfeatures=17 with 16 features.*finer grid"),
        ({"width": 0}, r"width must be >= 1, got 0"),
        ({"name": "conv", "columns": 3}, r"columns=3 is an option of name=mlp.*leave it null"),
        ({"name": "mlp", "input_size": 18}, r"does not divide input_size=18; choose a divisor"),
        ({"trunk": "resnet9"}, r"resnet8, resnet14"),
        ({"weights": "pretrained"}, r"weights=pretrained.*train a network with permafrost teach"),
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
        ({"partition": folder, "grid": (2, 4)}, r"groups 16 features.*has 8; set grid="),
        ({"partition": folder, "superfeatures": 5}, r"up to 3 superfeatures.*lower it"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(replace(CONV, **options), NUM_CLASSES)
    save_file({"other": torch.zeros(1)}, tmp_path / "p" / PARTITION_NAME)
    with pytest.raises(ConfigError, match=r"no i64 tensor `assignments`"):
        build_model(replace(CONV, partition=folder), NUM_CLASSES)
    save_partition(tmp_path / "p", scattered(CONV).clamp(max=1))
    with pytest.raises(
        ConfigError, match=r"partition=.* is damaged: each of 3 superfeatures needs"
    ):
        build_model(replace(CONV, partition=folder), NUM_CLASSES)


def test_inputs_of_another_shape_are_refused():
    for config, shape, message in (
        (MLP, (1, 3, 32, 32), r"AdditiveMlp takes images of 16x16.*augment.size"),
        (TABLE, (1, 3), r"columns=11 needs rows.*set columns"),
        (CONV, (1, 3, 18, 18), r"grid=\[4, 4\] does not divide an input of 18x18.*augment.size"),
        (TRUNK, (1, 3, 32, 32), r"must be that of its last stage, 8x8.*set grid=\[8,8\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            additive_model(config)(torch.zeros(shape))


def test_networks_without_superfeatures_or_features_say_what_to_choose():
    plain = freeze(build_model(CifarModelConfig(name="resnet8", width=2), NUM_CLASSES))
    images = torch.rand(1, 3, SIDE, SIDE)
    one = torch.zeros(1, 1, dtype=torch.int64)

    with pytest.raises(ConfigError, match=r"CifarResNet has no superfeatures.*teacher=additive"):
        network_partition(plain)
    with pytest.raises(ConfigError, match=r"CifarResNet; set explainer=gradcam"):
        explainer_named("superfeatures")(plain, plain(images), one)
    for config in (MLP, CONV):
        model = additive_model(config)
        with pytest.raises(ConfigError, match=r"set explainer=superfeatures"):
            explainer_named("gradcam")(model, model(images), one)


def test_the_hierarchy_is_plain_values():
    described = describe_partition(build_partition(replace(CONV, superfeatures=4)))

    assert [level["coarsening"] for level in described["hierarchy"]][:2] == [
        [0, 0, 0, 0],
        [0, 1, 0, 1],
    ]
    assert np.unique([level["sha256"] for level in described["hierarchy"]]).size == 4
