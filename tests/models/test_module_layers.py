"""Maps of a network of one's own at any of its layers, against GradCAM by autograd, or one sentence."""

import copy
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import permafrost
from permafrost.core.errors import ConfigError
from permafrost.models.explanations import gradcam
from permafrost.models.module import ModuleClassifier
from tests.support.gradcam import gradcam_of_layer


class Network(nn.Module):
    """Network whose forward is a function of its layers and the images."""

    def __init__(self, run, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.head = nn.Linear(8, 5)
        self.run = run

    def forward(self, images):
        return self.run(SimpleNamespace(head=self.head, **self.layers), images)


def conv(**options):
    return nn.Conv2d(3, 8, 3, stride=2, padding=1, **options)


def average(features):
    return features.mean(dim=(2, 3))


def relu_in_place(net, images):
    features = net.conv(images)
    return net.head(average(features.relu_()))


def sum_in_place(net, images):
    first = net.conv(images)
    second = net.other(first)
    second += first
    return net.head(average(second).square())


def input_changed_later(net, images):
    features = net.conv(images)
    same = net.identity(features)
    logits = net.head(average(same.tanh()))
    features.zero_()
    return logits


def scaled_in_place(net, images):
    return net.head(average(net.conv(images).mul_(3).clamp_(-1, 1)))


def channels_last(net, images):
    features = net.norm(net.conv(images).permute(0, 2, 3, 1))
    return net.head(F.gelu(features).mean(dim=(1, 2)))


def channels_last_average(net, images):
    return net.head(net.norm(net.conv(images).permute(0, 2, 3, 1)).mean(dim=(1, 2)))


def flattened(net, images):
    return net.last(net.conv(images).tanh().flatten(1))


torch.manual_seed(0)  # the maps of some random networks have no positive value

CASES = {
    "ReLU in place": (Network(relu_in_place, conv=conv()), "layers.conv", False),
    "a sum in place": (
        Network(sum_in_place, conv=conv(), other=nn.Conv2d(8, 8, 3, padding=1)),
        "layers.other",
        False,
    ),
    "the sum's other input": (
        Network(sum_in_place, conv=conv(), other=nn.Conv2d(8, 8, 3, padding=1)),
        "layers.conv",
        False,
    ),
    "input changed later": (
        Network(input_changed_later, conv=conv(), identity=nn.Identity()),
        "layers.identity",
        False,
    ),
    "scaled in place": (Network(scaled_in_place, conv=conv()), "layers.conv", False),
    "channels last": (
        Network(channels_last, conv=conv(), norm=nn.LayerNorm(8)),
        "layers.norm",
        True,
    ),
    "channels last, linear": (
        Network(channels_last_average, conv=conv(), norm=nn.LayerNorm(8)),
        "layers.norm",
        True,
    ),
    "one size only": (
        Network(flattened, conv=conv(), last=nn.Linear(8 * 8 * 6, 5)),
        "layers.conv",
        False,
    ),
}


@pytest.fixture(autouse=True)
def same_images():
    """Draw the same images in every run."""
    torch.manual_seed(1)


@pytest.mark.parametrize("name", CASES)
def test_the_maps_are_those_of_the_named_layer(name):
    network, layer, is_last = CASES[name]
    images = torch.rand(3, 3, 16, 12)

    explained = permafrost.explain(network, images, layer=layer)
    logits, maps = gradcam_of_layer(network, layer, images, channels_last=is_last)

    torch.testing.assert_close(explained.logits, logits)
    assert maps.max() > 0
    torch.testing.assert_close(
        explained.maps[:, 0, 0], maps, rtol=1e-4, atol=1e-6 * float(maps.max())
    )


@pytest.mark.parametrize("name", CASES)
def test_a_student_has_the_same_maps_in_its_step(name):
    network, layer, is_last = CASES[name]
    network = copy.deepcopy(network).double()
    images = torch.rand(3, 3, 16, 12, dtype=torch.float64)
    _, expected = gradcam_of_layer(network, layer, images, channels_last=is_last)
    model = ModuleClassifier(network, layer)

    output = model(images)
    maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True))
    maps.square().sum().backward()

    torch.testing.assert_close(maps.detach()[:, 0, 0], expected)
    assert all(p.grad is not None for p in network.layers["conv"].parameters())


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (40, 16), (8, 8)])
@pytest.mark.parametrize("channels", [2, 4, 8, 16])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_the_layout_is_read_from_the_layer(shape, channels, is_last, is_fixed):
    """Also where all sides of the output are equal, and where the network takes one size only."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 4, stride=4)
            self.layer = nn.Identity()

        def forward(self, images):
            assert not is_fixed or images.shape[2:] == shape
            features = self.conv(images)
            if not is_last:
                return self.layer(features).mean(dim=(2, 3))
            return self.layer(features.permute(0, 2, 3, 1)).mean(dim=(1, 2))

    grid = (shape[0] // 4, shape[1] // 4)
    assert ModuleClassifier(Patches(), "layer")(torch.rand(1, 3, *shape)).features.shape == (
        1,
        channels,
        *grid,
    )


class Tokens(nn.Module):
    """Attention of 64 tokens with heads of 64 channels: [B, heads, 64, 64], which is no grid of 64x64 cells."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, stride=8)
        self.heads = nn.Identity()
        self.attention = nn.Identity()
        self.head = nn.Linear(64, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # [B, 64, 64]
        heads = self.heads(tokens.unflatten(1, (1, -1)))
        scores = self.attention((heads @ heads.mT).softmax(dim=-1))
        return self.head((scores @ heads).mean(dim=(1, 2)))


class Returning(nn.Module):
    """Network that returns its logits in some other form."""

    def __init__(self, form):
        super().__init__()
        self.conv = conv()
        self.form = form

    def forward(self, images):
        return self.form(average(self.conv(images)))


def test_wrappers_of_a_network_are_opened():
    network = CASES["channels last"][0]
    images = torch.rand(2, 3, 16, 12)
    expected = permafrost.explain(network, images, layer="layers.norm").maps

    compiled = torch.compile(network)
    for wrapped, layer in (
        (compiled, "layers.norm"),
        (compiled, "_orig_mod.layers.norm"),
        (nn.DataParallel(network), "module.layers.norm"),
        (nn.DataParallel(compiled), "layers.norm"),
    ):
        maps = permafrost.explain(wrapped, images, layer=layer).maps
        torch.testing.assert_close(maps, expected, rtol=0, atol=0)
        names = list(ModuleClassifier(wrapped, layer).network.state_dict())
        assert names == list(network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_converted_to_the_dtype_of_the_weights(dtype):
    network = Network(flattened, conv=conv(), last=nn.Linear(8 * 8 * 6, 5))
    images = torch.rand(2, 3, 16, 12)
    expected = permafrost.explain(network, images, layer="layers.conv")
    classes = expected.target_class

    explained = permafrost.explain(
        copy.deepcopy(network).to(dtype), images, layer="layers.conv", target_class=classes
    )

    assert explained.maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(explained.maps.float(), expected.maps, rtol=0.1, atol=0.02)


def random_in_eval_mode(net, images):
    return net.head(average(F.dropout(net.conv(images), training=True)))


def detached(net, images):
    return net.head(average(net.conv(images)).tanh().detach())


def changed_in_another_place(net, images):
    features = net.conv(images)
    same = net.identity(features)
    features.relu_()
    return net.head(average(same))


def used_twice(net, images):
    return net.head(average(net.relu(net.conv(net.relu(images)))))


UNSOUND = {
    "two passes": (
        Network(used_twice, conv=conv(), relu=nn.ReLU()),
        "layers.relu",
        "runs 2 times in a forward pass; name another",
    ),
    "unused": (
        Network(relu_in_place, conv=conv(), extra=nn.ReLU()),
        "layers.extra",
        "does not run in a forward pass",
    ),
    "random": (Network(random_in_eval_mode, conv=conv()), "layers.conv", "random in eval mode"),
    "detached": (Network(detached, conv=conv()), "layers.conv", "have no gradient with respect to"),
    "an alias": (
        Network(changed_in_another_place, conv=conv(), identity=nn.Identity()),
        "layers.identity",
        "changes this tensor elsewhere",
    ),
    "heads": (
        Tokens(),
        "heads",
        r"returns \[B, 1, 64, 64\] for images of 64x64 pixels, and no two",
    ),
    "attention": (Tokens(), "attention", r"\[B, 1, 64, 64\].*weights of an attention"),
    "a tuple": (Returning(lambda z: (z, z)), "conv", "returns tuple. Wrap it in a module"),
    "a dict": (Returning(lambda z: OrderedDict(out=z)), "conv", "returns OrderedDict. Wrap it"),
    "no batch axis": (Returning(lambda z: z[:, 0]), "conv", r"returns \[B\]. Wrap it"),
    "gray images": (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.LazyLinear(5)),
        "0",
        r"cannot be run on images float32 \[2, 3, 64, 64\] and explained at layer 0 \(RuntimeError",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_cannot_be_explained_is_one_sentence(name):
    network, layer, message = UNSOUND[name]
    with pytest.raises(ConfigError, match=message):
        permafrost.explain(network, torch.rand(2, 3, 64, 64), layer=layer)


def test_a_network_that_returns_a_tuple_in_training_is_refused_there():
    class Auxiliary(Network):
        def forward(self, images):
            logits = super().forward(images)
            return (logits, logits) if self.training else logits

    model = ModuleClassifier(Auxiliary(relu_in_place, conv=conv()), "layers.conv")
    model.eval()(torch.rand(2, 3, 16, 12))
    with pytest.raises(ConfigError, match=r"logits \[B, K\]; in training it returns tuple"):
        model.train()(torch.rand(2, 3, 16, 12))


def test_logits_that_are_not_finite_are_left_to_the_pass_which_names_the_record():
    network = Network(lambda net, x: net.head(average(net.conv(x))) / 0.0, conv=conv())
    logits = ModuleClassifier(network, "layers.conv")(torch.rand(1, 3, 16, 12)).logits
    assert not logits.isfinite().any()


def test_a_scripted_network_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
    with pytest.raises(ConfigError, match="is a scripted network"):
        permafrost.explain(scripted, torch.rand(2, 3, 8, 8), layer="0")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([0, 1, 2]), r"is int64 \[3\] instead of int64 \[N, E\]"),
        (torch.tensor([[0.0], [1.0], [2.0]]), r"is float32 \[3, 1\]"),
        (torch.tensor([[0], [1]]), "images, but there are"),
        (torch.tensor([[0]] * 5), "images, but there are"),
        (torch.tensor([[0], [9], [1]]), r"has \[9\], but the network's 5 outputs are 0 to 4"),
        (torch.tensor([[0], [-2], [1]]), r"has \[-2\]"),
    ],
)
def test_classes_that_cannot_be_explained_are_refused(classes, message):
    network, layer, _ = CASES["ReLU in place"]
    with pytest.raises(ConfigError, match=message):
        permafrost.explain(
            network, torch.rand(3, 3, 16, 12), layer=layer, target_class=classes, batch_size=2
        )
