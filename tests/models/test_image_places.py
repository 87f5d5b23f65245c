"""Places of cells in the image, and changes of images inside of a network: found, and stored or refused."""

import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import transforms

import permafrost
from permafrost.core.errors import ConfigError
from permafrost.core.progress import log_once
from permafrost.models.classifier import Normalize
from permafrost.models.image_places import describe_wrong_places, read_input, replaced_parts
from permafrost.models.module import ModuleClassifier

SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Changed(nn.Module):
    """A network that changes its images first."""

    def __init__(self, change, patches=False):
        super().__init__()
        self.change = change
        self.patches = patches
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.embed = nn.Linear(3 * 64, 8)
        self.grid = nn.Identity()
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        images = self.change(images)
        if not self.patches:
            features = self.conv(images)
        else:
            rows, columns = (side // 8 for side in images.shape[2:])
            tokens = F.unfold(images, 8, stride=8).transpose(1, 2)
            features = self.embed(tokens).transpose(1, 2).unflatten(2, (rows, columns))
        return self.head(self.grid(features).relu().mean(dim=(2, 3)))


def pad(images, mode="constant"):
    return F.pad(images, (8, 8, 8, 8), mode=mode)


MOVED = {
    "center crop": (transforms.CenterCrop(SIDE // 2), "crop"),
    "resize and center crop": (
        transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64)]),
        "crop",
    ),
    "a corner": (lambda x: x[:, :, : SIDE // 2, : SIDE // 2], "crop|depend on"),
    "zero padding": (pad, "pads or moves its images"),
    "reflected padding": (lambda x: pad(x, "reflect"), "pads or moves its images"),
    "padding of one side": (lambda x: F.pad(x, (0, 16, 0, 16)), "pads or moves its images"),
    "a quarter turn": (lambda x: x.rot90(1, (2, 3)), "turns|quarter of the image"),
    "half a turn": (lambda x: x.flip(2, 3), "mirrors|quarter of the image"),
    "a mirror": (lambda x: x.flip(3), "mirrors|quarter of the image"),
    "rows as columns": (lambda x: x.transpose(2, 3), "turns|quarter of the image"),
}
IN_PLACE = {
    "as it is": nn.Identity(),
    "another size": lambda x: F.interpolate(x, size=48, mode="bilinear", antialias=True),
    "twice the size": lambda x: F.interpolate(x, scale_factor=2),
    "BGR of bytes": lambda x: x[:, [2, 1, 0]] * 255,
    "normalized": transforms.Normalize(MEAN, STD),
    "converted to bytes": lambda x: (x * 255).byte().float() / 255,
    "gray": lambda x: x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1),
    "a batch norm": nn.BatchNorm2d(3),
    "a stride that does not divide": lambda x: x[:, :, :-1, :-1],
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("patches", [False, True])
def test_maps_of_a_network_that_moves_its_images_are_refused(name, patches):
    change, words = MOVED[name]
    torch.manual_seed(0)
    network = Changed(change, patches)
    if patches and "padding" in name:
        pytest.skip("tokens of a linear layer have no convolution whose input could be read")

    with pytest.raises(ConfigError, match=words):
        permafrost.explain(network, torch.rand(2, 3, SIDE, SIDE), layer="grid")


@pytest.mark.parametrize("name", IN_PLACE)
def test_maps_of_a_network_that_leaves_places_are_explained(name):
    torch.manual_seed(0)
    network = Changed(IN_PLACE[name])

    permafrost.explain(network, torch.rand(2, 3, SIDE, SIDE), layer="grid")


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize(
    "stem",
    [
        [nn.Conv2d(3, 16, 7, 2, 3, padding_mode="reflect")],
        [nn.Conv2d(3, 16, 3, 1, 1, padding_mode="circular")],
        [nn.ReflectionPad2d(3), nn.Conv2d(3, 16, 7)],
        [nn.ZeroPad2d(3), nn.Conv2d(3, 16, 7, 2)],
        [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 16, 3, 2)],
        [nn.ReplicationPad2d(1), nn.Conv2d(3, 16, 3, 2)],
        [nn.Conv2d(3, 16, 8, 8)],
    ],
)
def test_padding_that_a_kernel_needs_is_none(stem, side):
    network = nn.Sequential(
        *stem, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    layer = str(len(stem))

    permafrost.explain(network, torch.rand(2, 3, side, side), layer=layer)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 64)])
def test_grids_of_few_cells_have_no_clear_order(seed, size):
    torch.manual_seed(seed)
    layers = []
    for number in range(4):
        layers += [nn.Conv2d(3 if number == 0 else 16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    permafrost.explain(network, torch.rand(2, 3, *size), layer="11")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.pad(x, (0, 16, 0, 16)),
        lambda x: F.pad(x, (8, 8, 8, 8)),
        lambda x: F.pad(F.interpolate(x, 16), (8, 8, 8, 8)),
        lambda x: F.pad(x.mean(1, keepdim=True), (8, 8, 8, 8)).expand(-1, 3, -1, -1),
    ],
)
def test_zeros_of_more_than_half_of_the_input_are_padding(change):
    with pytest.raises(ConfigError, match="pads or moves its images"):
        permafrost.explain(Changed(change), torch.rand(2, 3, 32, 32), layer="grid")


def test_a_table_of_positions_that_is_cached_is_no_memory():
    class Cached(Changed):
        def __init__(self):
            super().__init__(nn.Identity())
            self.register_buffer("places", None, persistent=False)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, images):
            features = self.conv(images)
            self.seen += len(images)
            if self.places is None:
                self.places = torch.linspace(0, 1, features.shape[-1])[None, None, None]
            return self.head(self.grid(features + self.places).relu().mean(dim=(2, 3)))

    assert permafrost.explain(Cached(), torch.rand(2, 3, 32, 32), layer="grid").maps.any()


def test_logits_of_a_network_that_crops_are_those_that_it_returns():
    torch.manual_seed(0)
    network = Changed(transforms.CenterCrop(32)).eval()
    images = torch.rand(2, 3, SIDE, SIDE)

    model = ModuleClassifier(network, "grid").eval()

    torch.testing.assert_close(model(images).logits, network(images))
    assert "crops its images" in model.misplacement


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (nn.AdaptiveAvgPool2d(8), "upper right quarter of the image is in the lower left"),
        (nn.Identity(), "no two neighboring axes of it are the rows and columns"),
    ],
)
def test_a_grid_that_is_turned_after_the_convolutions_is_refused(pool, said):
    class Turned(Changed):
        def forward(self, images):
            features = pool(self.conv(images)).transpose(2, 3)
            return self.head(self.grid(features).relu().mean(dim=(2, 3)))

    with pytest.raises(ConfigError, match=said):
        permafrost.explain(Turned(nn.Identity()), torch.rand(2, 3, SIDE, SIDE), layer="grid")


# ---- normalization -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            transforms.Normalize(MEAN, STD),
            "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]",
        ),
        (lambda x: 2 * x - 1, "mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]"),
        (lambda x: x * 255 - 128, "mean [0.502, 0.502, 0.502]"),
        (lambda x: F.interpolate((x - 0.5) / 0.5, size=48), "mean [0.5, 0.5, 0.5]"),
        (nn.Identity(), ""),
        (lambda x: x.flip(1), ""),
        (nn.BatchNorm2d(3), ""),
    ],
)
def test_a_normalization_within_one_is_a_loging(caplog, change, words):
    log_once.cache_clear()
    images = torch.rand(2, 3, SIDE, SIDE)

    ModuleClassifier(Changed(change), "grid").eval()(images)
    assert not caplog.messages  # with no normalization around it
    ModuleClassifier(Changed(change), "grid", Normalize(MEAN, STD)).eval()(images)

    assert len(caplog.messages) == bool(words)
    if words:
        assert f"Changed normalizes its images itself, (x - mean) / std with {words}" in caplog.text
        assert "set mean=[0,0,0] std=[1,1,1]" in caplog.text


def test_the_normalization_that_is_read_is_that_of_torchvision():
    reading = read_input(Changed(transforms.Normalize(MEAN, STD)), torch.rand(1, 3, 40, 56))

    torch.testing.assert_close(
        torch.tensor(reading.scale).double(), 1 / torch.tensor(STD).double(), atol=1e-4, rtol=0
    )
    shift = -torch.tensor(MEAN).double() / torch.tensor(STD).double()
    torch.testing.assert_close(torch.tensor(reading.shift).double(), shift, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(0, 0, 32, 64), (8, 20, 40, 30), (3, 3, 58, 58)]
)
def test_the_crop_that_is_read_is_the_one_that_is_made(top, left, height, width):
    def crop(images):
        return transforms.functional.crop(images, top, left, height, width)

    reading = read_input(Changed(crop), torch.rand(1, 3, SIDE, SIDE))

    actual = [*reading.origin, reading.down[0], reading.across[1]]
    # A stride of two around the first pixel begins half a pixel before it.
    expected = [side / SIDE for side in (top - 0.5, left - 0.5, height, width)]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-4, rtol=0)


# ---- ordinary networks -----------------------------------------------------------------------------

LAYERS = {
    "resnet18": "layer4", "resnet50": "layer4", "vgg11": "features", "densenet121": "features",
    "mobilenet_v2": "features", "mobilenet_v3_small": "features", "convnext_tiny": "features",
    "regnet_y_400mf": "trunk_output", "efficientnet_b0": "features", "swin_t": "features",
    "squeezenet1_1": "features", "shufflenet_v2_x0_5": "conv5", "mnasnet0_5": "layers",
    "alexnet": "features", "resnext50_32x4d": "layer4", "regnet_x_400mf": "trunk_output",
    "efficientnet_v2_s": "features", "swin_v2_t": "features", "maxvit_t": "blocks.3", "vgg11_bn": "features",
}  # fmt: skip
TIMM = {
    "resnet10t": "layer4", "mobilenetv3_small_050": "blocks", "tf_efficientnet_lite0": "conv_head",
    "mambaout_femto": "stages", "convnext_atto": "stages", "regnetx_002": "final_conv",
    "resnext26ts": "stages", "ghostnet_050": "blocks", "mobilenetv2_035": "blocks", "densenet121": "features",
    "dla46_c": "level5", "hrnet_w18_small": "final_layer", "res2net50_14w_8s": "layer4",
    "semnasnet_050": "blocks", "repvgg_a0": "stages", "fastvit_t8": "final_conv", "poolformer_s12": "stages",
    "tf_mobilenetv3_small_minimal_100": "blocks", "lcnet_035": "blocks", "edgenext_xx_small": "stages",
}  # fmt: skip


def assert_no_findings(network, layer, caplog):
    side = (
        224
        if "swin" in type(network).__name__.lower() or "MaxVit" in type(network).__name__
        else 128
    )
    model = ModuleClassifier(network, layer, Normalize(MEAN, STD)).eval()
    caplog.clear()
    with torch.no_grad():
        model(torch.rand(1, 3, side, side))  # refuses a dependence on other records
    assert model.misplacement == ""
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_networks_of_torchvision_have_no_finding(name, caplog):
    torch.manual_seed(0)
    assert_no_findings(getattr(torchvision.models, name)(), LAYERS[name], caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_have_no_finding(name, caplog):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    assert_no_findings(timm.create_model(name), TIMM[name], caplog)


def test_without_a_clear_order_nothing_is_said():
    """A network that mixes all places tells nothing about them."""
    outputs = torch.rand(6, 4, 7, 7)

    assert describe_wrong_places(outputs) == ""
    assert describe_wrong_places(torch.rand(6, 4, 1, 1)) == ""


def test_parts_are_replaced_each_alone():
    images = torch.stack([torch.zeros(3, 64, 96), torch.ones(3, 64, 96)])

    parts = replaced_parts(images)

    assert parts.shape == (6, 3, 64, 96)
    assert parts[0].sum() == 0
    assert [int(part.sum()) for part in parts[1:5]] == [3 * 16 * 24] * 4
    assert parts[1, 0, 0, 0] == parts[2, 0, 0, -1] == parts[3, 0, -1, 0] == parts[4, 0, -1, -1] == 1
    assert int(parts[5].sum()) == 3 * (64 * 96 - 60 * 90)
