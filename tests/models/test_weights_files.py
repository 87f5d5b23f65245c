"""Files of weights as other trainings write them: nested, prefixed, with more in them, or for other classes."""

from __future__ import annotations

import argparse
import logging
import re
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace
from pathlib import Path, PosixPath

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from permafrost.config.models import CifarModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import WeightsError
from permafrost.models.module import ModuleClassifier
from permafrost.models.network import Network
from permafrost.models.providers import build_model
from permafrost.models.weights import load_weights
from permafrost.storage.files import file_at
from permafrost_timm.options import TimmModelConfig
from tests.support.networks import torchvision_config
from tests.support.runs import assert_equal_states

SMALL = CifarModelConfig(name="resnet8", width=4)


@pytest.fixture
def good():
    """State of the network that a file is read for."""
    return fresh_state(1)


@pytest.fixture
def last():
    """State of the same network at another step of its training."""
    return fresh_state(2)


def fresh_state(seed, config=SMALL, classes=7):
    torch.manual_seed(seed)
    return build_model(config, classes).network.state_dict()


def named(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def load(path, content, config=SMALL, **options):
    """State of the network that is read from a torch file of this content."""
    torch.save(content, path)
    return build_model(replace(config, weights=str(path), **options), 7).network.state_dict()


def optimizer_of(state):
    return {"state": {0: {"exp_avg": torch.ones(3)}}, "exp_avg": dict(state), "param_groups": []}


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"model_state_dict": s, "epoch": 3, "optimizer_state_dict": optimizer_of(s)},
        lambda s: {"net": s, "acc": np.float64(0.9), "epoch": np.int64(3)},
        lambda s: {"weights": s, "args": argparse.Namespace(lr=1, folder=PosixPath("/data"))},
        lambda s: {"params": s},
        lambda s: {"module": s, "optimizer": optimizer_of(s)},
        lambda s: {"train": {"best": {"network": {"state_dict": s}}}},
        lambda s: {"epoch": 3, "lr": 0.1, "name": "net", **s},
        lambda s: [s, {"epoch": 3}],
        lambda s: {"state_dict": OrderedDict(named("model.", s)), "loops": {"fit": [1, 2]}},
        lambda s: {"fold": {0: s}},
        lambda s: {name: nn.Parameter(t, t.is_floating_point()) for name, t in s.items()},
    ],
)
def test_weights_are_found_at_any_key(tmp_path, good, nest):
    assert_equal_states(load(tmp_path / "w.pth", nest(good)), good)


def test_a_dictionary_that_contains_itself_is_read_once(tmp_path, good):
    content = {"net": good}
    content["again"] = content

    assert_equal_states(load(tmp_path / "w.pth", content), good)


@pytest.mark.parametrize(
    ("nest", "key"),
    [
        (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "state_dict_ema"),
        (
            lambda a, b: {"model": a, "model_ema": {"n_averaged": 3, **named("module.", b)}},
            "model_ema.module",
        ),
        (lambda a, b: {"ema": b, "model": a}, "ema"),
        (lambda a, b: {"params": a, "params_ema": b}, "params_ema"),
        (lambda a, b: {"student": named("module.", a), "teacher": b}, "teacher"),
        (lambda a, b: {**named("net.", a), **named("net_ema.", b)}, "net_ema"),
        (lambda a, b: {"model_state": a, "swa_model": named("module.", b)}, "swa_model.module"),
        (lambda a, b: {"net": a, "state_dict": b}, "state_dict"),
        (lambda a, b: {"first": b, "second": a}, "first"),
        (lambda a, b: {**a, "ema": named("module.", b)}, "ema.module"),
    ],
)
def test_averaged_weights_come_first_and_all_are_named(tmp_path, good, last, nest, key, caplog):
    path = tmp_path / "w.pth"

    assert_equal_states(load(path, nest(last, good)), good)

    (line,) = [r.getMessage() for r in caplog.records if "several sets" in r.getMessage()]
    assert line.startswith(f"{path} has several sets of weights: {key}, ")
    assert line.endswith(f"; {key} is read, and weights_key= chooses another")


def test_the_averages_of_torch_are_read_as_it_writes_them(tmp_path, good, last):
    network = build_model(SMALL, 7)
    network.network.load_state_dict(last)
    averaged = AveragedModel(nn.DataParallel(network))
    averaged.module.module.load_state_dict(good)

    content = {"model": last, "model_ema": averaged.state_dict()}

    assert_equal_states(load(tmp_path / "w.pth", content), good)


def test_a_key_chooses_among_several_weights(tmp_path, good, last):
    content = {"state_dict": named("module.", last), "state_dict_ema": good}
    path = tmp_path / "w.pth"

    assert_equal_states(load(path, content, weights_key="state_dict"), last)
    assert_equal_states(load(path, content, weights_key="state_dict_ema"), good)
    assert_equal_states(load(path, {**last, "ema": good}, weights_key="."), last)  # at the top
    with pytest.raises(
        WeightsError,
        match=r"weights_key=ema names no weights of CifarResNet in .*w\.pth; those that it has are "
        r"'state_dict_ema', 'state_dict\.module'$",
    ):
        load(path, content, weights_key="ema")


@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_a_key_without_a_file_is_refused(weights):
    config = torchvision_config("resnet18", weights=weights, weights_key="ema")

    with pytest.raises(ConfigError, match=f"weights_key=ema .* weights={weights} names none"):
        build_model(config, 7)


def test_an_average_of_the_parameters_alone_is_named_and_not_taken(tmp_path, last, caplog):
    """It lacks the statistics of batch norms, which are not those of other weights."""
    parameters = {name: t for name, t in last.items() if "running" not in name}
    path = tmp_path / "w.pth"

    assert_equal_states(load(path, {"model": last, "ema": {"shadow": parameters}}), last)

    assert f"{path}: passed over 'ema', no part of CifarResNet" in caplog.text


# ---- identity ------------------------------------------------------------------------------------


def test_a_file_with_a_single_set_keeps_its_identity_and_one_with_several_has_a_key(
    tmp_path, good, last
):
    single, several = tmp_path / "one.pth", tmp_path / "two.pth"
    torch.save({"state_dict": good, "optimizer": optimizer_of(good)}, single)
    torch.save({"state_dict": last, "state_dict_ema": good}, several)
    of_one, of_two = (replace(SMALL, weights=str(path)) for path in (single, several))
    random = torch.get_rng_state()

    described = Network(of_two, 7).describe()

    assert torch.equal(random, torch.get_rng_state())
    assert "weights_key" not in Network(of_one, 7).describe()
    assert (
        Network(replace(of_one, weights_key="state_dict"), 7).describe()
        == Network(of_one, 7).describe()
    )
    assert described["weights_key"] == "state_dict_ema"
    assert described["weights_sha256"] == file_at(several).sha256()
    other = Network(replace(of_two, weights_key="state_dict"), 7).describe()
    assert other == described | {"weights_key": "state_dict"}
    assert Network(of_one, 7).identify_start("weights") == file_at(single).sha256()
    assert (
        Network(of_two, 7).identify_start("weights")
        == f"{file_at(several).sha256()} state_dict_ema"
    )


def test_the_identity_does_not_depend_on_the_last_layer_being_read(tmp_path, good):
    content = {"student": good, "teacher": fresh_state(3, classes=9)}
    torch.save(content, tmp_path / "w.pth")
    config = replace(SMALL, weights=str(tmp_path / "w.pth"))

    assert "weights_key" not in Network(config, 7).describe()
    assert "weights_key" not in Network(config, 7).describe(reads_head=False)
    assert_equal_states(build_model(config, 7, may_replace_head=True).network.state_dict(), good)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."),
        *("model.", "net.", "backbone.", "encoder.", "anything.at.all."),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_common_prefix_is_removed_and_said(tmp_path, good, prefix, suffix, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(named(prefix, good), path)

    state = build_model(replace(SMALL, weights=str(path)), 7).network.state_dict()
    build_model(replace(SMALL, weights=str(path)), 7)

    assert_equal_states(state, good)
    assert caplog.text.count(f"{path}: the weights are those named {prefix}*") == 1


@pytest.mark.parametrize(
    "part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
def test_wrappers_inside_of_names_are_removed(tmp_path, good, part):
    wrapped = {re.sub(r"^(layer\d)\.", rf"\1.{part}.", name): t for name, t in good.items()}

    assert wrapped.keys() != good.keys()
    assert_equal_states(load(tmp_path / "w.pth", wrapped), good)


def test_a_network_inside_of_a_wrapper_takes_the_names_of_its_inside(tmp_path):
    torch.manual_seed(1)
    inner = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    torch.save({"net": inner.state_dict()}, tmp_path / "w.pth")
    model = ModuleClassifier(deepcopy(nn.Sequential(inner)), "0.0")
    nn.init.zeros_(model.network[0][0].weight)

    load_weights(model, tmp_path / "w.pth")

    assert_equal_states(model.network[0].state_dict(), inner.state_dict())


def test_what_a_training_has_beside_a_complete_network_is_passed_over_and_named(
    tmp_path, good, caplog
):
    path = tmp_path / "w.ckpt"
    beside = {"criterion.centers": torch.ones(3), "projector.0.weight": torch.ones(3)}

    assert_equal_states(load(path, {"state_dict": named("model.", good) | beside}), good)

    assert (
        f"{path}: passed over 'state_dict.criterion', 'state_dict.projector', no part of"
        in caplog.text
    )


def test_other_tensors_among_those_of_a_network_are_refused(tmp_path, good):
    """They are part of another network, such as a ViT's registers, or its norm before the blocks."""
    for other in ("reg_token", "norm_pre.weight", "criterion.centers"):
        for prefix in ("", "module."):
            with pytest.raises(WeightsError, match=f"unexpected: {other}"):
                load(tmp_path / "w.pth", named(prefix, good | {other: torch.ones(1, 4, 3)}))


def test_a_part_of_a_longer_network_is_refused(tmp_path):
    """All names and shapes of resnet8 are in the file of a resnet14."""
    longer = fresh_state(1, replace(SMALL, name="resnet14"))
    assert fresh_state(1).keys() < longer.keys()

    with pytest.raises(WeightsError, match=r"unexpected: layer1\.1\.bn1\.bias"):
        load(tmp_path / "w.pth", longer)
    with pytest.raises(WeightsError, match=r"at net does not fit .*unexpected: layer1\.1"):
        load(tmp_path / "w.pth", {"net": longer})


def test_a_set_that_lacks_a_tensor_is_refused_by_name(tmp_path, good):
    del good["layer1.0.conv1.weight"]

    with pytest.raises(
        WeightsError, match=r"at net\.module does not fit CifarResNet; missing: layer1\.0\.conv1\.w"
    ):
        load(tmp_path / "w.pth", {"net": named("module.", good)})


def test_counters_are_left_out_and_may_be_missing(tmp_path, good, caplog):
    for counter in ("total_ops", "layer1.total_params", "bn1.n_averaged"):
        assert_equal_states(load(tmp_path / "w.pth", good | {counter: torch.ones(1)}), good)
        assert "passed over" not in caplog.text
    without = {name: t for name, t in good.items() if not name.endswith("num_batches_tracked")}

    assert without.keys() < good.keys()
    assert_equal_states(load(tmp_path / "w.pth", without), good)


# ---- timm ----------------------------------------------------------------------------------------


def old_swin_name(name):
    name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return name.replace("head.fc.", "head.")


@pytest.mark.slow
def test_old_names_of_timm_are_read_as_timm_reads_them(tmp_path):
    config = TimmModelConfig(name="swin_tiny_patch4_window7_224")
    state = fresh_state(1, config)
    old = {old_swin_name(name): tensor for name, tensor in state.items()}
    old["layers.0.blocks.1.attn_mask"] = torch.ones(64, 49, 49)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.ones(49, 49)
    assert "layers.0.downsample.norm.weight" in old

    assert_equal_states(load(tmp_path / "w.pth", {"model": old}, config), state)
    other = {**old, "head.weight": torch.ones(9, 768), "head.bias": torch.ones(9)}
    with pytest.raises(WeightsError, match="It has 9 classes, the data 7: fine-tune"):
        load(tmp_path / "w.pth", {"model": other}, config)


def test_position_embeddings_of_another_size_are_resampled_as_timm_does_and_said(tmp_path, caplog):
    config = TimmModelConfig(name="test_vit")
    state = fresh_state(1, replace(config, input_size=96))
    torch.manual_seed(1)
    timms = timm.create_model("test_vit", num_classes=7)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), timms)

    loaded = load(tmp_path / "w.pth", state, config)

    assert loaded["pos_embed"].shape == (1, 101, 64)
    assert torch.equal(loaded["pos_embed"], filtered["pos_embed"])
    assert "resampled as timm does: pos_embed (1, 37, 64) to (1, 101, 64)" in caplog.text
    assert_equal_states(load(tmp_path / "w.pth", state, config, input_size=96), state)


def test_patches_of_another_size_are_another_network(tmp_path):
    config = TimmModelConfig(name="test_vit")
    state = fresh_state(1, config)
    state["patch_embed.proj.weight"] = torch.ones(64, 3, 8, 8)

    with pytest.raises(WeightsError, match=r"patch_embed\.proj\.weight \(64, 3, 8, 8\) instead of"):
        load(tmp_path / "w.pth", state, config)


# ---- other classes -------------------------------------------------------------------------------


def test_weights_of_other_classes_say_how_they_become_a_teacher(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"net": fresh_state(1, classes=1000)}, path)

    with pytest.raises(
        WeightsError,
        match=rf"wrong shape: linear\.bias \(1000,\) instead of \(7,\), .*\. It has 1,000 classes, the data 7: "
        rf"fine-tune it with permafrost teach \.\.\. teaching\.start={path}; set classes=1000 of the network if "
        r"some were appended; or, if the folders are classes of the weights, name all of these in data\.classes=$",
    ):
        build_model(replace(SMALL, weights=str(path)), 7)


def test_weights_without_a_last_layer_say_how_they_become_a_teacher(tmp_path, good):
    trunk = {name: t for name, t in good.items() if not name.startswith("linear.")}

    with pytest.raises(WeightsError, match=r"missing: linear\.bias, .* It has no last layer: fine"):
        load(tmp_path / "w.pth", named("backbone.", trunk))


def test_a_trunk_with_a_projection_in_the_place_of_its_last_layer_starts_a_training(tmp_path, good):
    """MoCo's encoders have linear.0 and linear.2 where the classifier has linear."""
    trunk = {name: t for name, t in good.items() if not name.startswith("linear.")}
    query = trunk | {"linear.0.weight": torch.ones(3, 16), "linear.2.weight": torch.ones(3, 3)}
    path = tmp_path / "w.pth"
    torch.save(
        {"state_dict": named("module.encoder_q.", query) | {"module.queue": torch.ones(2)}}, path
    )

    state = build_model(replace(SMALL, weights=str(path)), 7, may_replace_head=True).network

    assert_equal_states({n: t for n, t in state.state_dict().items() if n in trunk}, trunk)


# ---- kinds of tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_weights_are_converted(tmp_path, good, dtype):
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in good.items()}

    loaded = load(tmp_path / "w.pth", stored)

    for name, tensor in loaded.items():
        assert tensor.dtype == good[name].dtype
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


def test_sparse_weights_are_dense_in_the_network(tmp_path, good):
    good["linear.weight"][:, ::2] = 0
    sparse = good | {"linear.weight": good["linear.weight"].to_sparse()}

    assert_equal_states(load(tmp_path / "w.pth", sparse), good)


def with_weight(tensor):
    return lambda state: state | {"linear.weight": tensor}


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def factored(parametrize):
    def change(state):
        network = build_model(SMALL, 7).network
        parametrize(network.linear)
        return network.state_dict()

    return change


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_weight(torch.ones(7, 16, dtype=torch.int8)), r"of torch\.int8 .*It is quantized"),
        (lambda s: s | {"linear.weight": quantized(s["linear.weight"])}, "It is quantized"),
        (with_weight(torch.ones(7, 16, dtype=torch.complex64)), "Its numbers are complex"),
        (with_weight(torch.empty(7, 16, device="meta")), "shapes without values"),
        (with_weight(torch.empty(0)), "join them with its zero_to_fp32"),
        (
            lambda s: s | {"layer1.0.lora_A": torch.ones(2)},
            "It has adapters in addition to the weights",
        ),
        (factored(lambda m: prune.l1_unstructured(m, "weight", 0.5)), r"prune\.remove"),
        (factored(parametrizations.weight_norm), r"remove_parametrizations"),
        (factored(nn.utils.spectral_norm), r"remove_parametrizations"),
        (lambda s: {"_flat_param": torch.ones(300)}, "FULL_STATE_DICT"),
        (lambda s: {f"{n}.kernel": t for n, t in s.items()}, "names of Keras or Flax"),
        (lambda s: s | {"conv1.weight": torch.ones(4, 1, 3, 3)}, "takes images of 1 channels"),
        (lambda s: {"net": {n: t.numpy() for n, t in s.items()}}, r"\(numpy\S*, numpy.*not run"),
        (lambda s: {"epoch": 3, "note": "x"}, r"no state dict \(its entries are 'epoch', 'note'\)"),
    ],
)
def test_what_is_no_state_of_the_network_is_one_clear_sentence(tmp_path, good, change, message):
    with pytest.raises(WeightsError, match=message) as error:
        load(tmp_path / "w.pth", change(good))

    assert "\n" not in str(error.value)
    assert str(tmp_path / "w.pth") in str(error.value)


@pytest.mark.slow
def test_a_torchvision_vit_of_another_size_says_the_size(tmp_path):
    config = torchvision_config("vit_b_32", weights=None, input_size=64)
    state = fresh_state(1, config)

    with pytest.raises(WeightsError, match="is for images of 64 pixels; set input_size=64"):
        load(tmp_path / "w.pth", state, replace(config, input_size=96))


class Tied(nn.Module):
    """Two names of one layer."""

    def __init__(self, classes):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = self.first
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(4, classes)

    def forward(self, images):
        return self.linear(self.pool(self.second(images)))


def test_parameters_with_two_names_are_read_from_one(tmp_path):
    network = Tied(7)
    save_model(network, tmp_path / "w.safetensors")
    model = ModuleClassifier(Tied(7), "first")

    load_weights(model, tmp_path / "w.safetensors")

    assert_equal_states(model.network.state_dict(), network.state_dict())


# ---- folders -------------------------------------------------------------------------------------


def write_folder(folder, *names, state):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in names:
        (save_file if name.endswith("safetensors") else torch.save)(state, folder / name)


@pytest.mark.parametrize(
    "names", [["pytorch_model.bin"], ["best.pth"], ["model.safetensors", "pytorch_model.bin"]]
)
def test_the_only_weights_in_a_folder_are_read_and_said(tmp_path, good, names, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "network"
    write_folder(folder, *names, state=good)
    config = replace(SMALL, weights=str(folder))

    assert_equal_states(build_model(config, 7).network.state_dict(), good)

    assert f"weights={folder} is a folder; reading {names[0]} in it" in caplog.text
    named_file = replace(config, weights=str(folder / names[0]))
    assert Network(config, 7).describe() == Network(named_file, 7).describe()


def test_a_folder_with_several_files_of_weights_lists_them(tmp_path, good):
    write_folder(tmp_path / "a", "epoch1.pth", "epoch2.pth", state=good)
    write_folder(tmp_path / "b", state=good)
    write_folder(tmp_path / "c", "model-00001-of-00002.safetensors", state=good)
    (tmp_path / "c/model.safetensors.index.json").write_text("{}")

    (tmp_path / "c/model-00002-of-00002.safetensors").write_bytes(b"")
    for folder, message in (
        ("a", r"is a folder; name a file in it \(it has 'epoch1\.pth', 'epoch2\.pth'\)"),
        ("b", r"is a folder; name a file in it \(it has no file of weights\)"),
        ("c", r"in several files, listed in model\.safetensors\.index"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(replace(SMALL, weights=str(tmp_path / folder)), 7)


def test_a_folder_of_a_run_is_its_network(frozen, tmp_path):
    weights = Path(frozen.config.teacher.weights)
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    config = replace(frozen.config.teacher, weights=str(tmp_path))

    assert Network(config, 10).describe() == Network(frozen.config.teacher, 10).describe()
