"""B-cos networks: published names and sizes, options, and errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torchvision

from permafrost.config.models import TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze, teacher_input_size
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.models.weights import load_weights
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_papers.bcos.provider import build_bcos
from permafrost_papers.bcos.weight_maps import bcos_weights


def on_meta(name: str, outputs: int = 1000, **options):
    """Network on the meta device, with shapes but without values."""
    with torch.device("meta"):
        return build_bcos(BcosModelConfig(name=name, **options), outputs).network


def tensor_shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# ---- names and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_693_120),
        ("resnet50", 25_538_880),
        ("densenet121", 7_945_440),
        ("densenet169", 14_078_688),
        ("simple_vit_ti", 5_800_128),
        ("vitc_ti", 5_318_712),
        ("vitc_s", 20_878_704),
    ],
)
def test_networks_have_as_many_parameters_as_the_published_ones(name, parameters):
    assert sum(p.numel() for p in on_meta(name).parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "densenet121", "densenet169"])
def test_names_are_torchvisions_with_weights_under_linear_and_no_bias(name):
    with torch.device("meta"):
        state = tensor_shapes(torchvision.models.get_model(name, weights=None).state_dict())
    expected = {
        re.sub(
            r"((?:conv\d?|conv0|downsample\.0|fc|classifier)\.)weight$", r"\1linear.weight", n
        ): s
        for n, s in state.items()
        if not n.endswith(".bias")
    }
    for entry, shape in expected.items():
        if entry in ("conv1.linear.weight", "features.conv0.linear.weight"):
            expected[entry] = (64, 6, 7, 7)
        elif entry in ("fc.linear.weight", "classifier.linear.weight"):
            expected[entry] = (*shape, 1, 1)

    assert tensor_shapes(on_meta(name).state_dict()) == expected


def encoder_shapes(prefix: str, d: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.attn.norm.weight": (d,),
        f"{prefix}.attn.to_qkv.weight": (3 * d, d),
        f"{prefix}.attn.to_out.linear.weight": (d, d),
        f"{prefix}.ff.net.norm.weight": (d,),
        f"{prefix}.ff.net.linear1.linear.weight": (4 * d, d),
        f"{prefix}.ff.net.linear2.linear.weight": (d, 4 * d),
    }


@pytest.mark.parametrize(
    ("name", "width", "depth", "stem", "patch"),
    [
        ("simple_vit_ti", 192, 12, {}, 6 * 16 * 16),
        ("simple_vit_s", 384, 12, {}, 6 * 16 * 16),
        ("vitc_ti", 192, 11, {0: (24, 6), 3: (48, 24), 6: (96, 48), 9: (192, 96)}, 192),
        ("vitc_s", 384, 11, {0: (48, 6), 3: (96, 48), 6: (192, 96), 9: (384, 192)}, 384),
    ],
)
def test_names_of_a_vit_are_the_published_ones(name, width, depth, stem, patch):
    expected = {"0.to_patch_embedding.linear.linear.weight": (width, patch)}
    for index, (out, into) in stem.items():
        prefix = "0.to_patch_embedding.conv_stem"
        expected[f"{prefix}.{index}.linear.weight"] = (out, into, 3, 3)
        expected[f"{prefix}.{index + 1}.weight"] = (out,)
    for index in range(depth):
        expected |= encoder_shapes(f"0.transformer.encoder_{index}", width)
    expected["0.linear_head.norm.weight"] = (width,)
    expected["0.linear_head.linear.linear.weight"] = (1000, width)

    assert tensor_shapes(on_meta(name).state_dict()) == expected


def test_a_published_file_loads_key_for_key(tmp_path):
    config = BcosModelConfig(name="resnet8", width=4)
    state = build_model(config, 3).network.state_dict()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pth")
    fresh = build_model(config, 3)

    load_weights(fresh, tmp_path / "weights.pth")

    assert all(torch.equal(fresh.network.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("ours", "theirs", "side"),
    [
        ("resnet18", "resnet18", 48),
        ("resnet50", "resnet50", 48),
        ("densenet121", "densenet121", 96),
        ("simple_vit_ti", "simple_vit_ti_patch16_224", 224),
        ("vitc_ti", "vitc_ti_patch1_14", 224),
    ],
)
def test_logits_and_weights_are_those_of_the_published_code(ours, theirs, side):
    """Runs only if the PyPI package `bcos` (with einops) is installed, which is not a dependency."""
    pytest.importorskip("bcos")
    from bcos.models import pretrained

    torch.manual_seed(0)
    reference = getattr(pretrained, theirs)(pretrained=False).double()
    model = build_model(BcosModelConfig(name=ours), 1000).double()
    assert list(model.network.state_dict()) == list(reference.state_dict())
    model.network.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, side, side, dtype=torch.float64)
    classes = torch.tensor([[3], [5]])

    output = model.train()(images)
    maps = bcos_weights(model, output, classes)[:, 0]
    encoded = torch.cat([images, 1 - images], dim=1).requires_grad_()
    with reference.train().explanation_mode():
        logits = reference(encoded)
        (expected,) = torch.autograd.grad(logits.gather(1, classes).sum(), encoded)

    assert torch.allclose(output.logits, logits, atol=1e-6)  # their position embedding is float32
    assert (maps - expected).norm() < 1e-6 * expected.norm()


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (BcosModelConfig(name="resnet8", width=4), 16),
        (BcosModelConfig(name="resnet8", width=4, stem="large"), 32),
        (BcosModelConfig(name="resnet18", width=4, stem="small"), 16),
        (BcosModelConfig(name="resnet50", width=4, stem="small"), 16),
        (BcosModelConfig(name="densenet121", width=4, stem="small"), 16),
        (BcosModelConfig(name="simple_vit_ti", width=64), 32),
        (BcosModelConfig(name="vitc_ti", width=64), 48),
    ],
    ids=lambda value: value.name if isinstance(value, BcosModelConfig) else str(value),
)
def test_every_family_gives_logits_of_small_images(config, side):
    model = freeze(build_model(config, 5))
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    output = model(images)

    assert output.logits.shape == (2, 5)
    assert (output.logits - output.logits[:1]).abs()[1].max() > 0  # the logits depend on the image
    assert torch.equal(output.features, torch.cat([images, 1 - images], dim=1))
    assert model.head is None


def test_a_stem_decides_the_resolution_of_the_stages():
    def last_grid(**options):
        network = build_bcos(BcosModelConfig(width=4, **options), 3).network
        seen = []
        network.fc.register_forward_hook(lambda m, inputs, out: seen.append(out.shape[-1]))
        network(torch.rand(1, 6, 64, 64))
        return seen[0]

    assert last_grid(name="resnet18") == 2
    assert last_grid(name="resnet18", stem="small") == 8
    assert last_grid(name="resnet8") == 16
    assert last_grid(name="resnet8", stem="large") == 4


def test_logits_have_their_temperature_and_bias():
    images = torch.rand(2, 3, 16, 16)

    def logits(**options):
        config = BcosModelConfig(name="resnet8", width=4, weights="random", **options)
        return freeze(build_model(config, 5))(images).logits

    raw = logits(logit_bias=0.0)

    assert torch.allclose(logits(), raw - math.log(4))
    assert torch.allclose(logits(logit_temperature=0.5, logit_bias=1.0), 2 * raw + 1)


def test_b_1_is_a_linear_network():
    model = build_model(BcosModelConfig(name="resnet8", width=4, b=1.0, logit_bias=0.0), 3)
    network = freeze(model).network
    one, other = torch.rand(2, 1, 6, 16, 16)

    assert torch.allclose(network(one + 2 * other), network(one) + 2 * network(other), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"B-cos networks are named resnet18.*got 'resnet19'"),
        ({"weights": "pretrained"}, r"nothing is downloaded for kind bcos; name a file"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, r"mean and std must stay null"),
        ({"name": "simple_vit_ti", "width": 100}, r"multiple of 64, got 100"),
        ({"name": "simple_vit_ti", "stem": "small"}, r"no stem option, got stem=small"),
        ({"name": "densenet121", "width": 5}, r"must be even.*got 5"),
        ({"logit_temperature": 0.0}, r"logit_temperature must be > 0, got 0"),
        ({"b": 0.5}, r"b must be >= 1, got 0\.5"),
        ({"width": 0}, r"width must be >= 1 or null, got 0"),
        ({"patch": 4}, r"patch=4 is an option of B-cos ViTs"),
        ({"depth": 4}, r"depth=4 is an option of B-cos ViTs"),
    ],
)
def test_options_out_of_range_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        BcosModelConfig(**options)


def test_a_vit_says_which_images_it_takes():
    model = build_model(BcosModelConfig(name="simple_vit_ti", width=64), 3)

    with pytest.raises(ConfigError, match=r"patches of 16 pixels, got 40x40.*augment\.size"):
        model(torch.rand(1, 3, 40, 40))


def test_a_teacher_is_described_without_normalization(tmp_path):
    config = BcosModelConfig(name="resnet8", width=4, weights="random")

    description = Network(config, 3).describe()

    assert description["preprocessing"] == {
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "input_size": None,
    }
    assert description["architecture"]["b"] == 2.0
    assert teacher_input_size(config) is None


def test_a_trained_network_is_read_back(tmp_path):
    config = BcosModelConfig(name="resnet8", width=4)
    model = build_model(config, 3).eval()
    images = torch.rand(2, 3, 16, 16)

    save_model(tmp_path, model, TrainedModel(config=config, num_classes=3, input_size=(16, 16)))

    again, trained = SavedNetwork(tmp_path).load()
    assert trained.config == config
    assert torch.equal(again(images).logits, model(images).logits)


def test_torchvisions_networks_are_explained_by_gradcam_and_these_by_their_weights():
    assert build_bcos(BcosModelConfig(name="resnet8"), 3).explainer == "bcos_weights"
    plain = TorchvisionModelConfig(name="resnet18", weights="random")
    assert build_model(plain, 3).explainer == "gradcam"


def test_a_vit_of_small_patches_has_a_token_for_each_and_the_depth_that_is_asked_for():
    config = BcosModelConfig(name="simple_vit_ti", width=64, patch=4, depth=3)

    network = build_model(config, 10).network

    assert network[0].positions(torch.zeros(1, 6, 32, 32)).shape == (64, 64)
    assert len(network[0].transformer) == 3
    assert build_model(config, 10)(torch.rand(2, 3, 32, 32)).logits.shape == (2, 10)
