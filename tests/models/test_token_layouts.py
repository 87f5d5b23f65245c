"""Grids in the tokens of a layer, laid out without a reshape, against GradCAM with one written by hand."""

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torchvision
import transformers
from timm.models import beit, cait, mlp_mixer, vision_transformer, xcit
from torch import nn
from torch.utils.checkpoint import checkpoint

import permafrost
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import gradcam
from permafrost.models.layouts import Layout
from permafrost.models.module import ModuleClassifier
from tests.support.gradcam import gradcam_of_layer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
OF_HUGGING_FACE = SIZES | {"intermediate_size": 64, "patch_size": 16, "num_labels": 5}
OF_TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}


class Encoder(nn.Module):
    """Transformer of torch alone, which keeps the tokens on its first axis or on its second."""

    def __init__(self, batch_first):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)
        self.axis = 1 if batch_first else 0

    def forward(self, images):
        tokens = self.patches(images).flatten(2)
        tokens = tokens.transpose(1, 2) if self.axis else tokens.permute(2, 0, 1)
        return self.head(self.norm(self.encoder(tokens)).mean(dim=self.axis).tanh())


def hugging_face(name, **options):
    config = getattr(transformers, f"{name}Config")
    network = getattr(transformers, f"{name}ForImageClassification")
    return network(config(**OF_HUGGING_FACE | options))


def swin():
    sizes = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 4}
    config = transformers.SwinConfig(image_size=64, patch_size=4, num_labels=5, **sizes)
    return transformers.SwinForImageClassification(config)


NETWORKS = {
    "timm ViT": lambda: vision_transformer.VisionTransformer(**OF_TIMM, num_classes=5),
    "timm BEiT": lambda: beit.Beit(**OF_TIMM, num_classes=5, init_values=1.0),
    "timm CaiT": lambda: cait.Cait(**OF_TIMM, num_classes=5, init_values=1.0),
    "timm XCiT": lambda: xcit.Xcit(**OF_TIMM, num_classes=5, eta=1.0),
    "timm MLP-Mixer": lambda: mlp_mixer.MlpMixer(5, 64, patch_size=16, num_blocks=2, embed_dim=32),
    "torchvision ViT": lambda: torchvision.models.VisionTransformer(
        64, 16, 2, 2, 32, 64, num_classes=5
    ),
    "torch, batch first": lambda: Encoder(True),
    "torch, tokens first": lambda: Encoder(False),
    "Hugging Face ViT": lambda: hugging_face("ViT"),
    "Hugging Face DINOv2 with registers": lambda: hugging_face("Dinov2WithRegisters"),
    "Hugging Face Swin": swin,
}


@cache
def network_of(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(
            module, nn.Linear
        ):  # an untrained transformer gives nearly the same logits to all images
            nn.init.normal_(module.weight, std=0.1)
    return network


def after(prefix):
    """Return the reshape that is written by hand: without the first tokens, with the channels first."""

    def reshape(tokens):
        patches = tokens[:, prefix:].transpose(1, 2)
        return patches.unflatten(2, (math.isqrt(patches.shape[2]),) * 2)

    return reshape


LAYERS = """
timm ViT: blocks.1.norm1 1, blocks.0 1, patch_embed 0
timm BEiT: norm 1, blocks.0.mlp.act 1
timm CaiT: blocks.1 0, blocks_token_only.0.norm1 1
timm XCiT: blocks.1 0, cls_attn_blocks.0.norm1 1
timm MLP-Mixer: norm 0, blocks.0.norm2 0
torchvision ViT: encoder.layers.encoder_layer_1.ln_1 1, encoder.layers.encoder_layer_0 1
torch, batch first: encoder.layers.1 0, encoder.layers.0.norm2 0
torch, tokens first: encoder.layers.1 0, norm 0
Hugging Face ViT: vit.layers.1.layernorm_before 1, vit.embeddings 1
Hugging Face DINOv2 with registers: dinov2_with_registers.layernorm 5
Hugging Face Swin: swin.layernorm 0, swin.embeddings.norm 0
"""
"""Layers, and how many tokens are before the patches."""


@pytest.mark.parametrize("line", LAYERS.strip().splitlines())
def test_maps_at_tokens_are_those_of_a_reshape_by_hand(line):
    name, _, layers = line.rpartition(": ")
    network, images = network_of(name), torch.rand(3, 3, 64, 64)
    for layer, prefix in (each.split() for each in layers.split(", ")):
        reshape, layout = after(int(prefix)), f"b {prefix}+hw c".replace("0+", "")
        if name == "torch, tokens first":
            reshape, layout = lambda tokens: after(0)(tokens.transpose(0, 1)), "hw b c"

        signed = "gradcam sign=signed"
        explained = permafrost.explain(network, images, layer=layer, explainer=signed)
        logits, maps = gradcam_of_layer(network, layer, images, reshape=reshape, rectified=False)

        torch.testing.assert_close(explained.logits, logits, rtol=1e-5, atol=1e-6)
        largest = float(maps.abs().max())
        assert largest > 1e-4
        actual = explained.maps[:, 0, 0]
        torch.testing.assert_close(actual, maps, rtol=0, atol=1e-5 * largest)
        model = ModuleClassifier(network, layer)
        model(images)
        assert str(model.layout) == layout
        assert Layout.parse(layout) == model.layout


LAST = {
    "timm ViT": "blocks.1.norm1",
    "timm BEiT": "norm",
    "timm CaiT": "blocks_token_only.1.norm1",
    "timm XCiT": "cls_attn_blocks.1.norm1",
    "timm MLP-Mixer": "norm",
    "torchvision ViT": "encoder.layers.encoder_layer_1.ln_1",
    "torch, batch first": "norm",
    "torch, tokens first": "norm",
    "Hugging Face ViT": "vit.layers.1.layernorm_before",
    "Hugging Face DINOv2 with registers": "dinov2_with_registers.layernorm",
    "Hugging Face Swin": "swin.layernorm",
}


@pytest.mark.parametrize("name", LAST)
def test_without_a_layer_it_is_the_last_grid_that_the_logits_depend_on(name, caplog):
    network, images = network_of(name), torch.rand(2, 3, 64, 64)
    model = ModuleClassifier(network, "")
    output = model(images, Intermediates(stages=True, pooled=True))

    assert model.layer == LAST[name]
    maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True), sign="signed")
    assert (maps.flatten(1).abs().amax(dim=1) > 1e-4).all()
    assert [stage.output.shape[2] for stage in output.stages][-1] == 4
    if model.closed_form is None:  # otherwise the average of the features
        linear = network.get_submodule(model._classifier)
        torch.testing.assert_close(linear(output.pooled), output.logits)


def test_stages_of_a_transformer_are_its_hidden_states():
    network, images = network_of("Hugging Face ViT"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = ModuleClassifier(network, "")(images, Intermediates(stages=True))
        expected = network.vit(images, output_hidden_states=True)

    states = [expected.hidden_states[1], expected.last_hidden_state]
    assert len(output.stages) == 2
    for stage, tokens in zip(output.stages, states, strict=True):
        torch.testing.assert_close(stage.output, after(1)(tokens), rtol=0, atol=0)


# ---- layouts that no library has -------------------------------------------------------------------


class Tokens(nn.Module):
    """Network whose layer `form` returns tokens in some form, and whose logits are read from `tokens(form(...))`."""

    def __init__(self, form, tokens, *, channels=8, stride=(8, 8)):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, stride, stride)
        self.extra = nn.Parameter(torch.randn(1, 6, channels))
        self.form = Form(form)
        self.tokens = tokens
        self.head = nn.Linear(channels, 5)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        extra = self.extra.expand(len(images), -1, -1)
        return self.head(self.tokens(self.form(patches, extra)).mean(dim=1).tanh())


class Form(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


Named = namedtuple("Named", "state weights")

FORMS: dict[str, tuple[Any, Any]] = {
    "b hw c": (lambda p, e: p, lambda out: out),
    "b 2+hw c": (lambda p, e: torch.cat([e[:, :2], p], 1), lambda out: out),
    "b hw+1 c": (lambda p, e: torch.cat([p, e[:, :1]], 1), lambda out: out),
    "b 1+hw+5 c": (lambda p, e: torch.cat([e[:, :1], p, e[:, 1:]], 1), lambda out: out),
    "hw b c": (lambda p, e: p.transpose(0, 1), lambda out: out.transpose(0, 1)),
    "b c hw": (lambda p, e: p.mT, lambda out: out.mT),
    "b c 1+hw": (lambda p, e: torch.cat([e[:, :1], p], 1).mT, lambda out: out.mT),
    "0: b hw c": (lambda p, e: (p, e), lambda out: out[0]),
    "1: b 1+hw c": (lambda p, e: [e, torch.cat([e[:, :1], p], 1)], lambda out: out[1]),
    "state: b hw c": (lambda p, e: OrderedDict(a=e, state=p), lambda out: out["state"]),
}


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (72, 48), (16, 16)])
@pytest.mark.parametrize("channels", [4, 16, 32])
@pytest.mark.parametrize("layout", FORMS)
def test_the_layout_of_tokens_is_measured(layout, channels, size):
    """Also where there are as many channels as tokens, and of four patches."""
    torch.manual_seed(0)
    network = Tokens(*FORMS[layout], channels=channels).eval()
    images = torch.rand(2, 3, *size)

    model = ModuleClassifier(network, "form")
    features = model(images).features

    assert str(model.layout) == layout
    torch.testing.assert_close(features, network.patches(images), rtol=0, atol=0)
    leaf = features.detach().requires_grad_()
    torch.testing.assert_close(model.forward_head(leaf, images), network(images))


def test_a_named_tuple_stays_one_and_a_text_of_other_axes_is_refused():
    network, images = (
        Tokens(lambda p, e: Named(p, e), lambda out: out.state).eval(),
        torch.rand(2, 3, 32, 32),
    )
    model = ModuleClassifier(network, "form")
    torch.testing.assert_close(model.forward_head(model(images).features, images), network(images))
    with pytest.raises(ConfigError, match="layout=b h c names other axes; write those"):
        Layout.parse("b h c")


def test_a_layout_that_is_set_is_taken_unless_the_tokens_have_another_one():
    torch.manual_seed(0)
    network, images = Tokens(*FORMS["b 1+hw+5 c"]).eval(), torch.rand(2, 3, 32, 32)
    with pytest.raises(
        ConfigError, match=r"layout=b 2\+hw\+4 c .* move the tokens of 'b 1\+hw\+5 c'"
    ):
        permafrost.explain(network, images, layer="form", layout="b 2+hw+4 c")
    network = Tokens(products, lambda out: out, channels=16).eval()  # of two layouts
    model = ModuleClassifier(network, "form", layout="b c hw")
    assert model(images).features.shape == (2, 16, 4, 4)
    assert model.layer == "form"


def products(patches, extra):
    values = patches[..., :1]
    return values * values.mT


def shares(patches, extra):
    return (patches @ patches.mT).softmax(dim=-1)


REFUSED = {
    "two layouts": (products, "whose layout may be 'b hw c' or 'b c hw'; set layout= to one"),
    "weights of an attention": (shares, "weights of an attention, which are shares of tokens"),
    "several heads": (
        lambda p, e: shares(p, e)[:, None],
        r"\[B, 1, 16, 16\].*weights of an attention",
    ),
    "a bias": (lambda p, e: p[:1] * 0 + e[:1, :1], "no axis of it is clearly the patches"),
    "a bias of heads": (
        lambda p, e: p[None, :1, :4].expand(1, 2, 4, -1) * 0,
        "no axis of the batch",
    ),
    "one token": (lambda p, e: p.mean(1, keepdim=True), "no axis of it is clearly the patches"),
    "an average": (lambda p, e: p.mean(1), r"returns \[B, 16\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_grid_is_refused_for_maps_only(name):
    """A network whose branch returns something else still has its logits and its embedding."""
    torch.manual_seed(0)
    form, message = REFUSED[name]
    network = Branch(form).eval()
    images = torch.rand(2, 3, 32, 32)

    with pytest.raises(ConfigError, match=message):
        permafrost.explain(network, images, layer="form")
    output = ModuleClassifier(network, "form")(images, Intermediates(pooled=True))
    torch.testing.assert_close(output.logits, network(images))
    torch.testing.assert_close(network.head(output.pooled), network(images))


class Branch(Tokens):
    def __init__(self, form):
        super().__init__(form, None, channels=16)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        scale = self.form(patches, self.extra).square().mean()
        return self.head(patches.mean(dim=1) * (1 + 0 * scale))


# ---- what networks return, and errors by their kind ------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor | None = None


RETURNS = {
    "a dataclass": lambda logits, features: Output(logits, features),
    "a dict": lambda logits, features: {"features": features, "logits": logits},
    "a named tuple": lambda logits, features: namedtuple("Returned", "features logits")(
        features, logits
    ),
    "a tuple": lambda logits, features: (logits, features),
    "a list": lambda logits, features: [features, logits],
}


class Convolutions(nn.Module):
    """Small network, whose middle runs as `run(block, tensor)` says and whose output has some form."""

    def __init__(self, run=None, returned=None):
        super().__init__()
        self.stem, self.block = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()),
        )
        self.last, self.head = nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 5)
        self.run = run or (lambda block, x: block(x))
        self.returned = returned or (lambda logits, features: logits)

    def forward(self, images):
        features = self.last(self.run(self.block, self.stem(images)).tanh())
        return self.returned(self.head(features.tanh().mean(dim=(2, 3))), features)


@pytest.mark.parametrize("form", RETURNS)
def test_logits_are_read_from_what_a_network_returns(form):
    torch.manual_seed(0)
    network, images = Convolutions(returned=RETURNS[form]).eval(), torch.rand(2, 3, 32, 32)
    explained = permafrost.explain(network, images)
    network.returned = lambda logits, features: logits
    torch.testing.assert_close(explained.logits, network(images))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["last", "block"])
def test_checkpointed_activations_are_explained_where_torch_allows_it(layer, reentrant):
    """A layer after a reentrant checkpoint is; one inside of it has no gradient of its own, and the logits remain."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 32, 32)
    network = Convolutions(lambda block, x: checkpoint(block, x, use_reentrant=reentrant)).eval()
    plain = Convolutions().eval()
    plain.load_state_dict(network.state_dict())
    expected = permafrost.explain(plain, images, layer=layer)

    model = ModuleClassifier(network, layer)
    torch.testing.assert_close(model(images).logits, expected.logits)
    if reentrant and layer == "block":
        with pytest.raises(ConfigError, match="has no features for its maps"):
            permafrost.explain(network, images, layer=layer)
    else:
        torch.testing.assert_close(
            permafrost.explain(network, images, layer=layer).maps, expected.maps
        )


class NeedsAge(nn.Module):
    def forward(self, images, age):
        return images.mean(dim=(1, 2, 3))[:, None] * age


def raising(error):
    def run(block, x):
        raise error

    return Convolutions(run).eval()


ERRORS = {
    "another input": (
        NeedsAge(),
        r"missing 1 required positional argument: 'age'\); it takes more than images",
    ),
    "another size": (
        nn.Sequential(nn.Flatten(), nn.Linear(7, 5)),
        r"\); correct the size and channels of the images",
    ),
    "its own error": (raising(KeyError("fold")), r"KeyError: 'fold'\); its own code raises this"),
    "another device": (
        raising(RuntimeError("Expected all tensors to be on the same device, but got cuda:0")),
        "create them on the device of the images",
    ),
    "another precision": (
        raising(RuntimeError("mat1 and mat2 must have the same dtype, but got Float and Half")),
        "let it create tensors of the precision of the images",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_the_first_pass_are_said_by_their_kind(kind):
    network, message = ERRORS[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        ModuleClassifier(network, "")(torch.rand(2, 3, 32, 32))
    assert "\n" not in str(caught.value)


def test_a_lack_of_memory_is_left_to_the_batch_size():
    with pytest.raises(torch.OutOfMemoryError):
        ModuleClassifier(raising(torch.OutOfMemoryError("CUDA out of memory")), "")(
            torch.rand(1, 3, 32, 32)
        )
