"""Sizes that model.json states and the weights beside it do not have: one line, and no memory."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError, UserError
from permafrost.models import build_limit
from permafrost.models.build_limit import limited_construction
from permafrost.models.classifier import WeightsError
from permafrost.models.providers import build_model
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.storage.signed_files import read_json, write_json
from permafrost_papers.bcos.options import BcosModelConfig

CONFIG = CifarModelConfig(name="resnet8", width=4)


class Created(TorchDispatchMode):
    """Mode that keeps the largest number of values of a new tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def folder(tmp_path):
    """Run with a network of ten classes."""
    trained = TrainedModel(config=CONFIG, num_classes=10, input_size=(16, 16))
    save_model(tmp_path, build_model(CONFIG, 10), trained)
    return tmp_path


def sign(folder, values):
    """Change model.json as a stranger could; `model` are the options of the network."""
    described = read_json(folder / "model.json", "")
    model = described["model"] | values.get("model", {})
    write_json(folder / "model.json", described | values | {"model": model})


FORGED = [
    ({"model": {"width": 10**9}}, "does not fit its network"),
    ({"model": {"width": 3000}}, "does not fit its network"),
    ({"model": {"width": 10**30}}, "cannot be built|does not fit"),
    ({"model": {"width": 5}}, "wrong shape"),
    ({"model": {"name": "resnet9998", "width": 1}}, "does not fit its network"),
    ({"model": {"name": "resnet99999998"}}, "cifar models are named"),
    ({"model": {"classes": 10**9}}, "does not fit its network"),
    ({"model": {"input_size": 10**6}}, r"input_size must be in \[8, 4096\]"),
    ({"num_classes": 10**9}, "does not fit its network"),
    ({"num_classes": 10**30}, "cannot be built|does not fit"),
    ({"input_size": [10**6, 10**6]}, "model.json is damaged: an input of"),
]


@pytest.mark.parametrize(("values", "message"), FORGED)
def test_sizes_that_the_weights_do_not_have_are_one_line_and_take_no_memory(
    folder, values, message
):
    sign(folder, values)
    with Created() as created, pytest.raises(UserError, match=message):
        SavedNetwork(folder).load()
    assert created.largest <= build_limit._MORE_NUMBERS + 10**5


def test_a_teacher_of_a_run_is_limited_as_a_student_is(folder):
    weights = str(folder / "model.safetensors")
    assert build_model(replace(CONFIG, weights=weights), 10)
    with pytest.raises(WeightsError, match="does not fit its network"):
        build_model(replace(CONFIG, weights=weights, width=3000), 10)


@pytest.mark.parametrize(
    "config",
    [
        CifarModelConfig(name="resnet8", width=1),
        BcosModelConfig(name="simple_vit_ti", width=64, depth=1, patch=8),
        TorchvisionModelConfig(name="shufflenet_v2_x0_5"),
    ],
)
def test_the_networks_themselves_need_little_more_than_their_weights(tmp_path, monkeypatch, config):
    monkeypatch.setattr(build_limit, "_MORE_NUMBERS", 10**5)
    path = tmp_path / "model.safetensors"
    expected = build_model(replace(config, weights="random"), 10)
    save_file({n: t.contiguous() for n, t in expected.network.state_dict().items()}, path)
    with limited_construction(path):
        built = build_model(replace(config, weights="random"), 10)
    for name, tensor in expected.network.state_dict().items():
        assert torch.equal(tensor, built.network.state_dict()[name])


def test_tensors_on_meta_are_not_counted(folder):
    with limited_construction(folder / "model.safetensors"):
        assert torch.empty(10**10, device="meta").is_meta
        with pytest.raises(WeightsError, match="does not fit its network"):
            torch.empty(10**10)


def test_a_header_of_very_many_names_is_refused_before_it_is_parsed(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**22 + 1).to_bytes(8, "little") + b"{" * (2**22 + 1))
    config = replace(CONFIG, weights=str(path.rename(folder / "other.safetensors")))
    with pytest.raises((WeightsError, ConfigError), match="its header has 4,194,305 bytes"):
        build_model(config, 10)
