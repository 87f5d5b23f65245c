"""Additive networks on groups of a trunk's channels, and on trunks of torchvision and timm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from permafrost.config.models import TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.cost import count_parameters, measure_cost
from permafrost.models.explanations import explainer_named
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.models.weights import load_weights
from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.options import AdditiveModelConfig
from permafrost_papers.ked.partition import hierarchy_of, require_same_level
from permafrost_papers.ked.subnets import LOGITS
from tests.support.additive import (
    CHANNELS,
    NUM_CLASSES,
    SIDE,
    TRUNK,
    M,
    additive_model,
    inputs_of,
)

FOREIGN = {
    "torchvision": AdditiveModelConfig(
        superfeatures=M, trunk="resnet18", trunk_kind="torchvision", grid=(2, 2), width=4
    ),
    "timm": AdditiveModelConfig(
        superfeatures=M, trunk="test_resnet", trunk_kind="timm", grid=(2, 2), width=4
    ),
    "head with a norm": AdditiveModelConfig(
        superfeatures=M, trunk="test_convnext", trunk_kind="timm", grid=(2, 2), width=4
    ),
}
FOREIGN_SIDE = 64


def foreign_images(records=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(records, 3, FOREIGN_SIDE, FOREIGN_SIDE, generator=generator)


# ---- groups of channels --------------------------------------------------------------------------


def test_heads_on_channels_equal_1x1_convolutions_of_their_own_channels():
    model = additive_model(CHANNELS).double()
    output = model(inputs_of(TRUNK).double())
    group = network_partition(model).assignment(M)

    for m, found in enumerate(output.extras[LOGITS].unbind(dim=1)):
        own = output.features[:, group == m]
        weight = model.weight[group == m, 0].T[:, :, None, None]
        x = F.conv2d(own, weight, model.bias[m]).relu().mean(dim=(2, 3))
        for layer in model.tail.hidden:
            x = (x @ layer.weight[m] + layer.bias[m]).relu()
        expected = x @ model.tail.output.weight[m] + model.tail.output.bias[m]

        assert torch.allclose(found, expected, atol=1e-12)
    assert sorted(group.bincount().tolist()) == [4, 4, 8]


def test_without_one_group_the_logits_lose_its_superfeature_alone():
    model = additive_model(CHANNELS)
    features = model(inputs_of(TRUNK)).features
    group = network_partition(model).assignment(M)
    whole = model.forward_superfeatures(features).logits

    without = model.forward_superfeatures(features * (group != 1)[:, None, None]).logits

    assert torch.equal(without[:, [0, 2]], whole[:, [0, 2]])
    assert not torch.equal(without[:, 1], whole[:, 1])


def test_the_trunk_and_every_channel_learn():
    model = additive_model(CHANNELS).train().requires_grad_()

    model(inputs_of(TRUNK)).logits.square().sum().backward()

    assert all(parameter.grad.any() for parameter in model.parameters())


def test_networks_of_other_channels_agree_in_their_number_of_groups():
    wide, narrow = (
        hierarchy_of(network_partition(additive_model(replace(CHANNELS, **options))))
        for options in ({}, {"trunk_width": 2, "superfeatures": 2, "partition_control": "none"})
    )
    cells = hierarchy_of(network_partition(additive_model(TRUNK)))

    require_same_level(narrow, wide, 2, "t")
    require_same_level(cells, wide, 1, "t")
    with pytest.raises(ConfigError, match=r"differently into 2 superfeatures.*trunk_features"):
        require_same_level(cells, wide, 2, "t")


def test_saved_channels_come_back_with_their_groups(tmp_path):
    model = additive_model(CHANNELS)
    images = inputs_of(TRUNK)
    save_model(
        tmp_path,
        model,
        TrainedModel(config=CHANNELS, num_classes=NUM_CLASSES, input_size=(SIDE, SIDE)),
    )
    other = additive_model(replace(CHANNELS, partition_control="none"), seed=1)

    loaded, _ = SavedNetwork(tmp_path).load()
    load_weights(other, tmp_path / "model.safetensors")

    assert torch.equal(loaded(images).logits, model(images).logits)
    assert torch.equal(other(images).logits, model(images).logits)


def test_they_are_explained_by_gradcam_and_have_no_cells_of_their_own():
    model = additive_model(CHANNELS)
    output = model(inputs_of(TRUNK))
    one = torch.ones(4, 1, dtype=torch.int64)

    maps = explainer_named("gradcam")(model, output, one)

    assert maps.shape == (4, 1, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"groups of channels.*set explainer=gradcam"):
        explainer_named("superfeatures")(model, output, one)


# ---- trunks of other providers -------------------------------------------------------------------


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("features", ["cells", "channels"])
def test_a_trunk_of_another_provider_has_heads_and_no_idle_parameter(name, features):
    config = FOREIGN[name]
    if features == "channels":
        config = replace(config, trunk_features=features, grid=(8, 8))
    torch.manual_seed(0)
    model = build_model(config, NUM_CLASSES)
    assert model.training

    output = model(foreign_images(4))
    output.logits.square().sum().backward()

    assert torch.equal(output.extras[LOGITS].sum(dim=1), output.logits)
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []
    assert output.features.shape[2:] == (2, 2)


@pytest.mark.slow
def test_a_head_of_several_modules_leaves_no_idle_parameter():
    config = replace(FOREIGN["timm"], trunk="resnet50_clip", trunk_features="channels", grid=(8, 8))

    model = build_model(config, NUM_CLASSES)
    model(torch.rand(1, 3, 64, 64)).logits.square().sum().backward()

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert not any("attn" in name or "pos_embed" in name for name in trained)


def test_a_trunk_computes_the_features_of_the_network_it_is_taken_from():
    torch.manual_seed(0)
    model = build_model(FOREIGN["torchvision"], NUM_CLASSES).eval()
    torch.manual_seed(0)
    whole = build_model(TorchvisionModelConfig(name="resnet18"), NUM_CLASSES).eval()
    images = foreign_images()

    stages, features, _ = model.forward_stages(images)

    assert torch.equal(features, whole(images).features)
    assert [stage.output.shape[1] for stage in stages] == [64, 128, 256, 512]
    heads = count_parameters(model) - (count_parameters(whole) - 513 * NUM_CLASSES)
    assert heads == M * (513 * 4 + 5 * NUM_CLASSES)
    assert measure_cost(model, images[:1]).parameters == count_parameters(model)


@pytest.mark.parametrize("name", [pytest.param("torchvision", marks=pytest.mark.slow), "timm"])
def test_a_trunk_is_saved_and_read_again(name, tmp_path):
    config = FOREIGN[name]
    model = build_model(replace(config, weights="random"), NUM_CLASSES).eval()
    save_model(
        tmp_path,
        model,
        TrainedModel(
            config=config, num_classes=NUM_CLASSES, input_size=(FOREIGN_SIDE, FOREIGN_SIDE)
        ),
    )

    loaded, _ = SavedNetwork(tmp_path).load()

    images = foreign_images()
    assert torch.equal(loaded(images).logits, model(images).logits)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trunk_kind": "timm", "trunk_width": 4}, r"trunk_width=4 is an option of trunk_kind=cif"),
        ({"trunk_kind": "timm", "stem_stride": 2}, r"stem_stride=2 is an option of trunk_kind=ci"),
        ({"name": "conv", "trunk_kind": "timm"}, r"trunk_kind=timm is an option of name=trunk"),
        ({"name": "mlp", "trunk_features": "channels"}, r"trunk_features=channels is an option of"),
        ({"trunk_features": "channels", "partition": "p"}, r"groups channels; set partition=null"),
        (
            {"trunk_features": "channels", "grid": (4, 4)},
            r"grid=\(4, 4\) is an option of trunk_feat",
        ),
        ({"trunk": "resnet18"}, r"got 'resnet18'; .*; or set trunk_kind=torchvision or t"),
    ],
)
def test_options_of_another_trunk_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        AdditiveModelConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            replace(CHANNELS, trunk_width=2, superfeatures=9),
            r"superfeatures=9, but the last stage .* 8 channels",
        ),
        (
            AdditiveModelConfig(trunk_kind="torchvision", trunk="resnet19"),
            r"torchvision has no classifier 'resnet19'.*resnet18",  # lists close names
        ),
    ],
)
def test_more_groups_than_channels_and_unknown_trunks_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        build_model(config, NUM_CLASSES)


@pytest.mark.slow
def test_a_trunk_that_reads_a_class_token_is_refused():
    for kind, name in (("timm", "test_vit"), ("torchvision", "vit_b_32")):
        config = AdditiveModelConfig(trunk_kind=kind, trunk=name)
        with pytest.raises(ConfigError, match=rf"trunk={name} .*class token.*convolutional"):
            build_model(config, NUM_CLASSES)


def test_another_grid_than_the_trunks_is_refused():
    model = build_model(replace(FOREIGN["torchvision"], grid=(4, 4)), NUM_CLASSES)
    with pytest.raises(ConfigError, match=r"2x2 cells for this input; set grid=\[2,2\]"):
        model(foreign_images())


def test_weights_of_cells_do_not_fit_channels(tmp_path):
    cells = additive_model(TRUNK)
    save_file(cells.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"weight"):
        load_weights(additive_model(CHANNELS), tmp_path / "w.safetensors")
