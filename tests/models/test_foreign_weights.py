"""Weights of other tools: the kind of a file by its content, the last layer wherever it stands, layers beside it."""

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError
from permafrost.models.classifier import WeightsError
from permafrost.models.providers import build_model
from permafrost_timm.options import TimmModelConfig
from tests.support.runs import assert_equal_states

SMALL = CifarModelConfig(name="resnet8", width=4)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return build_model(SMALL, 7).network


def load(path, config=SMALL, classes=7, **options):
    return build_model(replace(config, weights=str(path)), classes, **options).network


# ---- kinds of files ------------------------------------------------------------------------------


def test_the_content_of_a_file_decides_and_not_its_name(tmp_path, network):
    state = network.state_dict()
    (tmp_path / "weights.bin").write_bytes(save(dict(state)))
    torch.save(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)

    for name in ("weights.bin", "weights.safetensors", "old.safetensors"):
        assert_equal_states(load(tmp_path / name).state_dict(), state)


def torch_script(path, network):
    torch.jit.trace(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 16, 16)).save(path)


def exported(path, network):
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.rand(1, 3, 16, 16),))
    data = io.BytesIO()
    torch.export.save(program, data)
    path.write_bytes(data.getvalue())


def onnx_program(path, network):
    pytest.importorskip("onnxscript")
    images = (torch.rand(1, 3, 16, 16),)
    program = torch.onnx.export(nn.Conv2d(3, 4, 3).eval(), images, dynamo=True, verbose=False)
    path.write_bytes(program.model_proto.SerializeToString())


def arrays(path, network):
    with path.open("wb") as file:
        np.savez(file, **{name: t.numpy() for name, t in network.state_dict().items()})


def keras(path, network):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")


def hdf5(path, network):
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


def compressed(path, network):
    import gzip

    path.write_bytes(gzip.compress(b"x" * 100))


def archive_of_tar(path, network):
    import tarfile

    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())


WRITERS = {
    "TorchScript": (torch_script, "a TorchScript program; load it with torch.jit.load"),
    "torch.export": (exported, "a program of torch.export; load it with torch.export.load"),
    "ONNX": (onnx_program, "an ONNX program"),
    "npz": (arrays, "an archive of NumPy arrays; read it with numpy.load"),
    "npy": (lambda path, _: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(120)), "a NumPy array"),
    "Keras 3": (keras, "a network of Keras"),
    "HDF5": (hdf5, "a network of Keras"),
    "Flax": (lambda path, _: path.write_bytes(b"\x81\xa6params\x81\xa4conv"), "a network of Flax"),
    "GGUF": (lambda path, _: path.write_bytes(b"GGUF\x03\0\0\0"), "a GGUF file"),
    "TensorFlow Lite": (lambda path, _: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(40)), "TensorFlow Lite"),
    "gzip": (compressed, "a compressed file; decompress it"),
    "tar": (archive_of_tar, "a tar archive; unpack it"),
    "index": (lambda path, _: path.write_text('{"metadata": {}, "weight_map": {}}'), "in several files, join"),
    "Git LFS": (lambda path, _: path.write_text("version https://git-lfs.github.com/spec"), "git lfs pull"),
    "a web page": (lambda path, _: path.write_text("<!DOCTYPE html><html>"), "a web page"),
    "nothing": (lambda path, _: path.write_bytes(b""), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_of_another_tool_is_named_with_the_way_out(tmp_path, network, kind, suffix):
    writer, words = WRITERS[kind]
    path = tmp_path / f"weights.{suffix}"
    writer(path, network)

    with pytest.raises(WeightsError) as error:
        load(path)
    assert words in str(error.value)
    assert "damaged" not in str(error.value)


def test_the_way_out_of_a_program_of_torchscript_works(tmp_path):
    config = TorchvisionModelConfig(name="mobilenet_v3_small")
    network = build_model(config, 5).network.eval()
    torch.jit.trace(network, torch.rand(1, 3, 64, 64)).save(tmp_path / "program.pt")

    torch.save(torch.jit.load(tmp_path / "program.pt").state_dict(), tmp_path / "weights.pt")

    assert_equal_states(load(tmp_path / "weights.pt", config, 5).state_dict(), network.state_dict())


def test_a_truncated_file_of_torch_is_still_damaged(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])

    with pytest.raises(WeightsError, match="damaged, truncated"):
        load(tmp_path / "w.pt")


def test_one_part_of_several_is_named(tmp_path, network):
    half = dict(list(network.state_dict().items())[:20])
    save_file(half, tmp_path / "model-00001-of-00003.safetensors")

    with pytest.raises(WeightsError, match="It is part 1 of 3 of a network; join them"):
        load(tmp_path / "model-00001-of-00003.safetensors")


# ---- folders -------------------------------------------------------------------------------------


FOLDERS = {
    "DCP": ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
    "DeepSpeed": (["zero_to_fp32.py", "latest"], "zero_to_fp32.py"),
    "DeepSpeed, one step": (["mp_rank_00_model_states.pt", "x_optim_states.pt"], "DeepSpeed; the zero_to_fp32"),
    "SavedModel": (["saved_model.pb", "fingerprint.pb"], "SavedModel of TensorFlow"),
    "Orbax": (["manifest.ocdbt", "_METADATA"], "Orbax"),
    "adapter": (["adapter_config.json", "adapter_model.bin", "other.bin"], "merge_and_unload"),
    "shards": (
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "several files, listed in model.safetensors.index.json",
    ),
    "unpacked": (["data.pkl", "version", "byteorder"], "zip -0 -r"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_tool_is_named_with_what_converts_it(tmp_path, kind):
    names, words = FOLDERS[kind]
    for name in names:
        (tmp_path / name).write_bytes(b"")

    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert words in str(error.value)
    assert "it has no file of weights" not in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_converter_of_a_distributed_checkpoint_is_the_one_that_works(tmp_path, network):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save(network.state_dict(), checkpoint_id=tmp_path / "step", no_dist=True)
    with pytest.raises(ConfigError, match="dcp_to_torch"):
        load(tmp_path / "step")

    dcp_to_torch_save(tmp_path / "step", tmp_path / "weights.pt")
    assert_equal_states(load(tmp_path / "weights.pt").state_dict(), network.state_dict())


# ---- the last layer --------------------------------------------------------------------------------


def with_head(network, head, name="linear"):
    """Return the network's state with the tensors of another head in the place of its own."""
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("linear.")}
    return state | {f"{name}.{n}": t for n, t in head.state_dict().items()}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("prefix", ["", "model.", "module.backbone."])
def test_a_last_layer_in_a_sequential_is_loaded_and_said(tmp_path, network, place, prefix, caplog):
    linear = nn.Linear(16, 7)
    layers = [nn.Dropout(0.5), nn.ReLU(), nn.Flatten()]
    layers.insert(place, linear)
    state = with_head(network, nn.Sequential(*layers))
    path = tmp_path / f"{place}{len(prefix)}.pth"
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)

    loaded = load(path).state_dict()

    assert torch.equal(loaded["linear.weight"], linear.weight)
    assert torch.equal(loaded["linear.bias"], linear.bias)
    assert f"linear.{place} is taken for the last layer, linear" in caplog.text


def test_a_last_layer_of_another_name_is_loaded_if_it_has_the_classes(tmp_path, network):
    for name in ("fc", "head.fc", "classifier.1"):
        torch.save(with_head(network, nn.Linear(16, 7), name), tmp_path / "w.pth")
        assert load(tmp_path / "w.pth").linear.weight.shape == (7, 16)

    torch.save(with_head(network, nn.Linear(16, 9), "projection"), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"unexpected: projection\.bias"):
        load(tmp_path / "w.pth")


def test_a_last_layer_of_several_layers_is_refused_by_their_names(tmp_path, network):
    head = nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 7))
    torch.save(with_head(network, head), tmp_path / "w.pth")

    with pytest.raises(WeightsError, match=r"It has several last layers, 'linear\.0', 'linear\.1'"):
        load(tmp_path / "w.pth")


def test_a_last_layer_of_other_classes_in_a_sequential_says_their_number(tmp_path, network):
    torch.save(
        with_head(network, nn.Sequential(nn.Dropout(), nn.Linear(16, 12))), tmp_path / "w.pth"
    )

    with pytest.raises(WeightsError, match="It has 12 classes, the data 7: fine-tune"):
        load(tmp_path / "w.pth")
    assert load(tmp_path / "w.pth", may_replace_head=True).linear.weight.shape == (7, 16)


def test_heads_of_torchvision_and_timm_in_a_sequential_are_loaded(tmp_path):
    for config, head in (
        (TorchvisionModelConfig(name="resnet18"), "fc"),
        (TorchvisionModelConfig(name="mobilenet_v3_small"), "classifier.3"),
        (TimmModelConfig(name="resnet10t"), "fc"),
        (TimmModelConfig(name="mambaout_femto"), "head.fc2"),
    ):
        if config.kind == "timm":
            pytest.importorskip("timm")
        model = build_model(config, 5).network
        if head not in dict(model.named_modules()):
            continue
        state = model.state_dict()
        renamed = {
            n.replace(f"{head}.", f"{head}.1.") if n.startswith(f"{head}.") else n: t
            for n, t in state.items()
        }
        torch.save(renamed, tmp_path / "w.pth")
        assert_equal_states(load(tmp_path / "w.pth", config, 5).state_dict(), state)


# ---- layers beside the network ---------------------------------------------------------------------


def beside(network, **tensors):
    return {f"0.{n}": t for n, t in network.state_dict().items()} | tensors


@pytest.mark.parametrize(
    "content",
    [
        lambda n: nn.Sequential(n, nn.Linear(7, 7)).state_dict(),
        lambda n: nn.Sequential(n, nn.Linear(7, 3)).state_dict(),
        lambda n: nn.Sequential(nn.Conv2d(3, 3, 1), n).state_dict(),
        lambda n: nn.Sequential(nn.BatchNorm2d(3), n).state_dict(),
        lambda n: {"model": nn.Sequential(n, nn.BatchNorm1d(7)).state_dict()},
        lambda n: {f"model.{k}": t for k, t in n.state_dict().items()} | {"temperature": torch.ones(1)},
        lambda n: {f"net.{k}": t for k, t in n.state_dict().items()} | {"calibrator.weight": torch.eye(7)},
        lambda n: {f"net.{k}": t for k, t in n.state_dict().items()} | {"head2.weight": torch.ones(4, 7)},
        lambda n: {f"net.{k}": t for k, t in n.state_dict().items()} | {"adapt.weight": torch.ones(3, 3, 1, 1)},
        lambda n: {f"net.{k}": t for k, t in n.state_dict().items()} | {"logit_scale": torch.ones(())},
    ],
)  # fmt: skip
def test_a_layer_before_or_after_the_network_is_refused(tmp_path, network, content):
    torch.save(content(network), tmp_path / "w.pth")

    with pytest.raises(WeightsError, match=r"layers before or after it, .* name the whole network"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content",
    [
        lambda n: [n.state_dict(), optimizer_state(n)],
        lambda n: within(n, {"criterion.weight": torch.ones(7), "loss.temperature": torch.ones(1)}),
        lambda n: within(n, {"val_acc.confmat": torch.ones(7, 7).long(), "metric.x": torch.ones(7, 7)}),
        lambda n: {f"networks.{i}.{k}": t for i in range(2) for k, t in n.state_dict().items()},
        lambda n: {"net": n.state_dict(), "optimizer": optimizer_state(n), "epoch": torch.tensor(3.0)},
    ],
)  # fmt: skip
def test_what_is_no_layer_is_passed_over(tmp_path, network, content):
    torch.save(content(network), tmp_path / "w.pth")

    assert_equal_states(load(tmp_path / "w.pth").state_dict(), network.state_dict())


def within(network, tensors):
    """Return a checkpoint of Lightning with tensors beside those of the network."""
    return {"state_dict": {f"model.{k}": t for k, t in network.state_dict().items()} | tensors}


def optimizer_state(network):
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: t.clone() for name, t in network.state_dict().items()}
    optimizer.step()
    network.load_state_dict(state)
    return optimizer.state_dict()


# ---- what a file cannot contain --------------------------------------------------------------------


def test_what_is_assumed_beside_the_tensors_of_a_file_is_said(tmp_path, network, caplog):
    caplog.set_level("INFO", logger="permafrost.models")
    torch.save(network.state_dict(), tmp_path / "assumed.pth")

    for _ in range(2):
        load(tmp_path / "assumed.pth")

    lines = [line for line in caplog.messages if "assumed.pth has tensors only" in line]
    assert len(lines) == 1
    assert "strides, dilations, pooling, activations and normalization are assumed" in lines[0]
    assert "cifar resnet8" in lines[0]
