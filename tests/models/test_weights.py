"""Weights of networks: files, published names, saved models, descriptions and addresses."""

from __future__ import annotations

import datetime
import functools
import json
import re
import ssl
import tarfile
import threading
import urllib.error
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum

from permafrost.config.models import CifarModelConfig, TorchvisionModelConfig
from permafrost.core.errors import ConfigError, UserError
from permafrost.models.classifier import Classifier, WeightsError
from permafrost.models.explanations import gradcam
from permafrost.models.network import Network
from permafrost.models.providers import (
    build_model,
    freeze,
    model_normalization,
    provider_of,
    published,
)
from permafrost.models.saved import SavedNetwork, TrainedModel, save_model
from permafrost.models.trained_weights import WeightsFile
from permafrost.models.weights import load_weights
from permafrost.storage import buckets
from permafrost.storage.files import file_at
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_timm.options import TimmModelConfig
from tests.support.networks import NUM_CLASSES, timm_config, torchvision_config
from tests.support.paths import SHARED_DATA
from tests.support.runs import assert_equal_states
from tests.support.slow import slow
from tests.support.tensors import random_images

DATA = SHARED_DATA


needs_data = pytest.mark.skipif(
    not DATA.exists(), reason=f"real images and published weights are not in {DATA}"
)


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CifarModelConfig(name="resnet8", weights="random"),
        torchvision_config("shufflenet_v2_x0_5"),
        timm_config("resnet10t"),
    ],
    ids=lambda config: config.kind,
)
def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone(config):
    torch.manual_seed(1)
    first = build_model(config, NUM_CLASSES).state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(2)
    second = build_model(config, NUM_CLASSES).state_dict()
    torch.manual_seed(1)

    assert_equal_states(first, second)
    assert torch.equal(drawn, torch.rand(3))


def test_fresh_weights_differ():
    one, other = (build_model(TimmModelConfig(name="resnet10t"), 2) for _ in range(2))

    assert not torch.equal(one.network.fc.weight, other.network.fc.weight)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_plain_torchvision_file_loads_unchanged(tmp_path, suffix):
    network = torchvision.models.resnet18(num_classes=NUM_CLASSES)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)

    model = build_model(torchvision_config("resnet18", weights=str(path)), NUM_CLASSES)

    assert_equal_states(model.network.state_dict(), network.state_dict())


def old_densenet_name(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name)


def old_vit_name(name: str) -> str:
    return name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2.")


@pytest.mark.parametrize(
    ("name", "old_name", "beside"),
    [
        ("densenet121", old_densenet_name, {}),
        pytest.param("vit_b_32", old_vit_name, {}, marks=pytest.mark.slow),
        ("googlenet", str, {"aux1.fc1.weight": torch.ones(2)}),
        ("mnasnet0_5", str, {}),
    ],
)
def test_the_names_of_torchvisions_older_files_are_understood(tmp_path, name, old_name, beside):
    config = torchvision_config(name, input_size=32 if name == "vit_b_32" else None)
    state = build_model(config, NUM_CLASSES).network.state_dict()
    published_state = {
        old_name(n): tensor for n, tensor in state.items() if "num_batches_tracked" not in n
    }
    torch.save(published_state | beside, tmp_path / "weights.pth")
    fresh = build_model(torchvision_config(name, weights=None, input_size=config.input_size), 7)

    load_weights(fresh, tmp_path / "weights.pth")

    assert_equal_states(fresh.network.state_dict(), state)


def test_weights_of_another_network_list_the_keys(tmp_path):
    state = torchvision.models.resnet18(num_classes=5).state_dict()
    state["extra"] = state.pop("conv1.weight")
    save_file(state, tmp_path / "weights.safetensors")

    with pytest.raises(
        WeightsError,
        match=r"does not fit ResNet; missing: conv1\.weight; unexpected: extra; "
        r"wrong shape: fc\.bias \(5,\) instead of \(7,\), fc\.weight",
    ):
        build_model(
            torchvision_config("resnet18", weights=str(tmp_path / "weights.safetensors")), 7
        )


@pytest.mark.parametrize(
    "config",
    [
        CifarModelConfig(name="resnet8", width=4),
        BcosModelConfig(name="resnet8", width=4),
        slow(torchvision_config("convnext_tiny", weights=None)),
    ],
    ids=lambda config: config.kind,
)
def test_training_may_start_from_a_file_of_other_classes_with_a_last_layer_of_its_own(
    tmp_path, config
):
    state = build_model(config, 5).network.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    start = replace(config, weights=str(path))

    trunk = build_model(start, 7, may_replace_head=True).network.state_dict()

    fresh = {name for name in trunk if not torch.equal(trunk[name], state[name])}
    assert {trunk[name].shape[0] for name in fresh} == {7}
    assert len(fresh) == (1 if config.kind == "bcos" else 2)
    with pytest.raises(WeightsError, match="wrong shape"):
        build_model(start, 7)


def test_a_file_of_another_network_is_refused_whatever_its_classes(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(build_model(CifarModelConfig(name="resnet8", width=5), 5).state_dict(), path)
    config = CifarModelConfig(name="resnet8", width=7, weights=str(path))

    with pytest.raises(WeightsError, match=r"wrong shape: .*conv1\.weight"):
        build_model(config, 7, may_replace_head=True)


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"epoch": 3}, torch.ones(2)])
def test_a_torch_file_without_a_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    model = build_model(CifarModelConfig(name="resnet8"), NUM_CLASSES)

    with pytest.raises(WeightsError, match=r"weights\.pth .*contains .*state_dict\(\)"):
        load_weights(model, tmp_path / "weights.pth")


def test_no_weights_are_published_for_cifar():
    with pytest.raises(ConfigError, match=r"weights=pretrained: nothing is published.*name a file"):
        build_model(CifarModelConfig(weights="pretrained"), NUM_CLASSES)


def test_published_torchvision_weights_load_with_a_fresh_head_for_other_classes(monkeypatch):
    state = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: state)
    config = torchvision_config("resnet18", weights="pretrained")

    whole = build_model(config, 1000).network.state_dict()
    trunk = build_model(config, NUM_CLASSES).network.state_dict()

    assert_equal_states(whole, state)
    assert trunk["fc.weight"].shape == (NUM_CLASSES, 512)
    for name in ("fc.weight", "fc.bias"):
        del trunk[name], state[name]
    assert_equal_states(trunk, state)


def test_weights_that_cannot_be_fetched_say_the_way_out(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    monkeypatch.setattr(timm, "create_model", fail)

    for config in (
        torchvision_config("resnet18", weights="pretrained"),
        timm_config("resnet18", weights="pretrained"),
    ):
        with pytest.raises(WeightsError, match=r"resnet18.*no route to host.*to a local file"):
            build_model(config, 1000)


def test_a_local_hub_folder_of_timm_loads_offline(tmp_path):
    network = timm.create_model("resnet10t", num_classes=5).eval()
    timm.models.save_for_hf(
        network,
        str(tmp_path / "hub"),
        model_config={"pretrained_cfg": {"mean": (0.1, 0.2, 0.3), "num_classes": 5}},
        safe_serialization=True,
    )
    config = TimmModelConfig(name=f"local-dir:{tmp_path / 'hub'}", weights="pretrained")

    model = build_model(config, 5)
    other_head = build_model(config, NUM_CLASSES)

    assert_equal_states(model.network.state_dict(), network.state_dict())
    assert published(config).classes == 5
    assert model_normalization(config)[0] == (0.1, 0.2, 0.3)
    assert torch.allclose(model.normalize.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert other_head.network.fc.out_features == NUM_CLASSES
    assert torch.equal(other_head.network.conv1[0].weight, network.conv1[0].weight)


# ---- saved files ---------------------------------------------------------------------------------


def save_trained(config, model: Classifier, folder: Path) -> None:
    trained = TrainedModel(config=config, num_classes=NUM_CLASSES, input_size=(64, 64))
    save_model(folder, model, trained)


@pytest.mark.slow
def test_a_torchvision_students_file_loads_with_plain_torchvision(tmp_path):
    config = TorchvisionModelConfig(name="resnet18")
    model = build_model(config, NUM_CLASSES).eval()

    save_trained(config, model, tmp_path)

    plain = torchvision.models.resnet18(num_classes=NUM_CLASSES).eval()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    again, _ = SavedNetwork(tmp_path).load()
    images = random_images(64)
    with torch.no_grad():
        assert torch.equal(plain(model.normalize(images)), model(images).logits)
        assert torch.equal(again(images).logits, model(images).logits)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "config",
    [
        TimmModelConfig(name="resnet10t", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)),
        TimmModelConfig(name="vit_tiny_patch16_224", input_size=64),
    ],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize("layout", [slow(torch.contiguous_format), torch.channels_last])
def test_a_timm_student_is_exported_as_timms_hub_has_it(tmp_path, config, layout):
    model = build_model(config, NUM_CLASSES).eval()
    images = random_images(64)

    save_trained(config, model.to(memory_format=layout), tmp_path)
    provider_of(config).export(tmp_path / "export", model, SavedNetwork(tmp_path).describe())

    convolutions = [p for p in model.parameters() if p.dim() == 4 and min(p.shape) > 1]
    assert all(p.is_contiguous(memory_format=layout) for p in convolutions)  # it is not changed
    model.to(memory_format=torch.contiguous_format)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    settings = loaded.pretrained_cfg
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    again, _ = SavedNetwork(tmp_path).load()
    with torch.no_grad():
        expected = model(images).logits
        assert torch.allclose(loaded((images - mean) / std), expected, atol=1e-5)
        assert torch.equal(again(images).logits, expected)
    assert loaded.num_classes == NUM_CLASSES
    assert settings["input_size"] == (3, 64, 64)
    written = json.loads((tmp_path / "export/config.json").read_text())
    assert written["num_classes"] == NUM_CLASSES


# ---- a teacher's description ---------------------------------------------------------------------


def test_a_teacher_is_described_by_its_numbers_and_not_by_where_they_lie(tmp_path):
    random = timm_config("resnet10t", input_size=48, frame="center_crop")
    path = tmp_path / "weights.safetensors"
    save_file(build_model(random, NUM_CLASSES).network.state_dict(), path)
    from_file = timm_config("resnet10t", weights=str(path))

    description = Network(random, NUM_CLASSES).describe("bfloat16")

    assert description == Network(random, NUM_CLASSES).describe("bfloat16")
    assert description["architecture"] == {"kind": "timm", "name": "resnet10t"}
    assert description["classes"] == NUM_CLASSES
    assert description["frame"] == "center_crop"
    assert description["dtype"] == "bfloat16"
    mean, std = model_normalization(random)
    assert description["preprocessing"] == {"mean": mean, "std": std, "input_size": 48}
    assert len(description["weights_sha256"]) == 64
    assert description["weights_sha256"] != Network(random, 8).describe()["weights_sha256"]
    assert Network(from_file, NUM_CLASSES).describe()["weights_sha256"] == file_at(path).sha256()
    assert Network(from_file, NUM_CLASSES).describe()["preprocessing"]["input_size"] is None


def test_an_untrained_teacher_must_be_asked_for():
    with pytest.raises(ConfigError, match=r"teacher\.weights is not set.*teacher\.weights=random"):
        Network(TorchvisionModelConfig(), NUM_CLASSES).describe()


def test_a_published_teacher_of_other_classes_is_refused():
    with pytest.raises(ConfigError, match=r"has 1000 outputs, but 7 .*teacher\.classes=1000"):
        Network(TorchvisionModelConfig(weights="pretrained"), NUM_CLASSES).describe()


# ---- real weights --------------------------------------------------------------------------------


def read_test_images(count: int) -> tuple[list[str], Tensor]:
    """Read the keys and images in [0, 1] of the first records of CIFAR-10's test set."""
    keys, images = [], []
    with tarfile.open(DATA / "cifar10/test-000000.tar") as archive:
        for member in archive:
            if member.name.endswith(".jpg") and len(keys) < count:
                content = bytearray(archive.extractfile(member).read())
                encoded = torch.frombuffer(content, dtype=torch.uint8)
                keys.append(Path(member.name).stem)
                images.append(torchvision.io.decode_jpeg(encoded))
    return keys, torch.stack(images).float() / 255


@needs_data
@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
def test_published_cifar_files_load_unchanged(file):
    path = DATA / "weights" / file
    expected = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]

    model = build_model(CifarModelConfig(name=file.split("-")[0], weights=str(path)), 10)

    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, expected.get(f"module.{name}", tensor)), name


@needs_data
def test_resnet56_gives_the_logits_and_maps_that_were_computed_elsewhere():
    golden = np.load(DATA / "golden/resnet56_cifar10_test512.npz")
    weights = DATA / "weights/resnet56-4bfd9763.th"
    model = freeze(build_model(CifarModelConfig(name="resnet56", weights=str(weights)), 10))
    keys, images = read_test_images(64)

    with torch.no_grad():
        output = model(images)
        maps = gradcam(model, output, output.logits.argmax(dim=1, keepdim=True))[:, 0, 0]

    expected = torch.from_numpy(golden["cam"][:64])
    assert keys == golden["key"][:64].tolist()
    assert np.abs(output.logits.numpy() - golden["logits"][:64]).max() < 1e-3
    assert (F.cosine_similarity(maps.flatten(1), expected.flatten(1)) > 0.99999).all()
    assert torch.allclose(maps * maps[0].numel(), expected, atol=1e-3)


class Quiet(SimpleHTTPRequestHandler):
    """Handler without a log."""

    def log_message(self, *words):
        pass


def signed(name, key, issuer, issuer_key, *, is_authority):
    """Certificate of a name, in PEM."""
    now = datetime.datetime.now(datetime.UTC)
    subject, signer = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_teacher):
    """Addresses of a folder with the weights of the tiny teacher, by scheme, and the file of the authority."""
    folder = tmp_path_factory.mktemp("certificates")
    authority, own = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    (folder / "authority.pem").write_bytes(
        signed("tests", authority, "tests", authority, is_authority=True)
    )
    (folder / "own.pem").write_bytes(
        signed("localhost", own, "tests", authority, is_authority=False)
        + own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem")
    weights = Path(tiny_teacher.weights)
    handler = functools.partial(Quiet, directory=str(weights.parent))
    servers = {
        scheme: ThreadingHTTPServer(("localhost", 0), handler) for scheme in ("http", "https")
    }
    servers["https"].socket = context.wrap_socket(servers["https"].socket, server_side=True)
    for server in servers.values():
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield (
        {
            scheme: f"{scheme}://localhost:{server.server_address[1]}/{weights.name}"
            for scheme, server in servers.items()
        },
        folder / "authority.pem",
    )
    for server in servers.values():
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERMAFROST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_clients", {})


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_weights_at_an_address_are_those_of_the_file(served, tiny_teacher, monkeypatch, scheme):
    addresses, authority = served
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    remote = replace(tiny_teacher, weights=addresses[scheme])

    assert Network(remote, 10).describe() == Network(tiny_teacher, 10).describe()
    assert WeightsFile(remote.weights).path.read_bytes() == Path(tiny_teacher.weights).read_bytes()
    with pytest.raises(UserError, match=r"weights-none does not exist; correct the address$"):
        WeightsFile(addresses[scheme].rpartition("/")[0] + "/weights-none")


def test_a_certificate_of_an_unknown_authority_is_one_line(served, monkeypatch):
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)

    with pytest.raises(
        UserError, match="certificate is not accepted, UnknownIssuer; SSL_CERT_FILE"
    ):
        WeightsFile(f"{served[0]['https']}-of-another-name")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://host.invalid/weights.pth", "no such host"),
        ("http://localhost:1/w", "connection refused"),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_line(monkeypatch, address, reason):
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)
    monkeypatch.setattr(buckets, "_TRIES", 1)
    monkeypatch.setenv("PERMAFROST_SERVER_WAIT", "0")

    with pytest.raises(UserError, match=rf"^{address} cannot be read \({reason}"):
        WeightsFile(address)
