"""Precision of a pass: one forward pass of the teacher, and a fingerprint that names what was computed."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.pass_plan import plan_pass
from permafrost.annotation.precision import (
    PRECISION_RECORDS,
    ComparePrecision,
    PrecisionError,
    compare_values,
    describe_shortfall,
)
from permafrost.config.explainers import GradCamConfig
from permafrost.config.models import CifarModelConfig, ModuleConfig, TorchvisionModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import ConfigError
from permafrost.core.records import FieldSpec
from permafrost.models.compute import fastest_precision
from permafrost.models.explanations import pass_precision
from permafrost.models.network import Network
from permafrost.models.providers import build_model
from permafrost.store.frames import FrameBatch
from permafrost.store.manifest import Agreement
from permafrost.store.reader import Store
from permafrost_papers.bcos.options import BcosModelConfig, BcosWeightsConfig
from permafrost_papers.bcos.provider import BcosClassifier
from permafrost_timm.options import TimmModelConfig
from tests.support.slow import slow
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

NETWORK = BcosModelConfig(name="resnet8", width=4)


@pytest.fixture
def bcos_config(tmp_path):
    """Function that configures a pass of a B-cos teacher on one store."""
    torch.manual_seed(0)
    path = tmp_path / "bcos.safetensors"
    save_file(build_model(NETWORK, 10).network.state_dict(), path)

    def configure(**annotate):
        return replace(
            precompute_config(tmp_path / "store", replace(NETWORK, weights=str(path))),
            explainer=BcosWeightsConfig(),
            annotate=PassOptions(**annotate),
        )

    return configure


@pytest.mark.parametrize(
    ("outputs", "explainer", "precision"),
    [
        (("logits", "maps"), BcosWeightsConfig(), "float32"),
        (("logits",), BcosWeightsConfig(), "bfloat16"),
        (("logits", "maps"), GradCamConfig(), "bfloat16"),
    ],
)
def test_only_maps_that_are_gradients_of_the_whole_network_take_a_float32_pass(
    outputs, explainer, precision
):
    options = PassOptions(outputs=outputs, precision="bfloat16")

    assert pass_precision(options, explainer) == precision
    assert pass_precision(replace(options, precision="float32"), explainer) == "float32"


def test_a_bcos_teacher_runs_once_in_any_precision_and_makes_the_pass_of_float32(
    bcos_config, monkeypatch, caplog
):
    with caplog.at_level(logging.INFO, logger="permafrost.precompute"):
        precompute.run(bcos_config(precision="bfloat16"))
    assert (
        "annotate.precision=bfloat16: maps of explainer=bcos_weights are gradients" in caplog.text
    )
    store = Store(Path(bcos_config().store.path))
    (made,) = store.open_passes()
    assert made.manifest.teacher["dtype"] == "float32"

    again = precompute.run(bcos_config(precision="float32"))

    assert again.teacher_records == 0
    assert [p.name for p in Store(store.path).open_passes()] == [made.name]
    logits_alone = plan_pass(bcos_config(precision="bfloat16", outputs=("logits",)), store)
    assert logits_alone.description["teacher"]["dtype"] == "bfloat16"


def test_logits_beside_maps_are_those_of_float32(bcos_config):
    """Control: without maps, bfloat16 rounds them."""
    logits = {}
    for name, options in {
        "with_map": {"precision": "bfloat16"},
        "exact": {"outputs": ("logits",)},
        "rounded": {"outputs": ("logits",), "precision": "bfloat16"},
    }.items():
        precompute.run(bcos_config(name=name, **options))
        store = Store(Path(bcos_config().store.path))
        (made,) = store.open_passes((name,))
        logits[name] = np.concatenate([made.read_shard(s)["logits"] for s in store.shards])

    np.testing.assert_array_equal(logits["with_map"], logits["exact"])
    assert (logits["rounded"] != logits["exact"]).any()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_network_runs_once_per_batch(bcos_config, monkeypatch, precision):
    config = bcos_config(precision=precision)
    annotator = TeacherAnnotator(
        config.teacher, 10, BcosWeightsConfig(), config.annotate, frame_size=(16, 16)
    )
    passes = []
    head = BcosClassifier.forward_head
    monkeypatch.setattr(BcosClassifier, "forward_head", lambda *a: passes.append(1) or head(*a))
    frames = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = FrameBatch(frames, torch.full((4,), 16.0), torch.full((4,), 16.0), torch.arange(4))

    values, _ = annotator.annotate([batch, batch], [str(key) for key in range(8)])

    assert len(passes) == 2
    assert values["map"].shape == (8, 1, 1, 6, 16, 16)


# ---- agreement with float32 ------------------------------------------------------------------------


def test_values_of_two_passes_are_compared_by_closed_forms():
    specs = [
        FieldSpec(name="logits", shape=(2,), dtype="float16"),
        FieldSpec(name="map", shape=(1, 1, 1, 2), dtype="float16", axes=("target", "channel", "y", "x")),
        FieldSpec(name="map_scale", shape=(1,), dtype="float32"),
        FieldSpec(name="target_class", shape=(1,), dtype="int32"),
        FieldSpec(name="pooled", shape=(2,), dtype="float16"),
    ]  # fmt: skip
    log3 = np.log(3.0)
    exact = {
        "logits": np.array([[[log3, 0]], [[0, 1]], [[5, 0]]], np.float32),
        "map": np.array([[1, 0], [1, 1], [1, 0]], np.float16).reshape(3, 1, 1, 1, 1, 2),
        "map_scale": np.ones((3, 1, 1), np.float32),
        "target_class": np.array([[[0]], [[1]], [[0]]], np.int32),
        "pooled": np.array([[[1, 0]], [[0, 0]], [[1, 1]]], np.float16),
    }
    lower = exact | {
        "logits": np.array([[[0, 0]], [[1, 0]], [[5, 0]]], np.float32),
        "map": np.array([[1, 1], [0, 1], [1, 0]], np.float16).reshape(3, 1, 1, 1, 1, 2),
        "target_class": np.array([[[0]], [[0]], [[0]]], np.int32),
        "pooled": np.array([[[0, 1]], [[0, 0]], [[2, 2]]], np.float16),
    }

    compared = compare_values(specs, exact, lower)

    np.testing.assert_array_equal(compared["top1"], [True, False, True])
    divergence = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(compared["kl"][[0, 2]], [divergence, 0], atol=1e-12)
    # The second record's maps are of different classes.
    np.testing.assert_allclose(compared["map"], [np.sqrt(0.5), 1])
    np.testing.assert_allclose(compared["pooled"], [0, 1, 1], atol=1e-12)
    assert set(compared) == {"top1", "kl", "map", "pooled"}


def test_wrong_scales_of_channels_are_refused_although_their_units_agree():
    specs = [
        FieldSpec(name="features_1", shape=(4, 2, 2), dtype="int8", axes=("channel", "y", "x")),
        FieldSpec(name="features_1_scale", shape=(4,), dtype="float32", axes=("channel",)),
        FieldSpec(name="attention_1", shape=(3, 2), dtype="float16", axes=("y", "x")),
        FieldSpec(name="attention_1_scale", shape=(1,), dtype="float32", axes=("map",)),
    ]
    generator = np.random.default_rng(0)
    exact = {
        "features_1": generator.integers(-127, 128, (6, 1, 4, 2, 2)).astype(np.int8),
        "features_1_scale": np.ones((6, 1, 4), np.float32),
        "attention_1": generator.random((6, 1, 3, 2)).astype(np.float16),
        "attention_1_scale": np.ones((6, 1, 1), np.float32),
    }
    scales = np.array([1, 5, 1, 5], np.float32)
    lower = exact | {
        "features_1_scale": exact["features_1_scale"] * scales,
        "attention_1_scale": exact["attention_1_scale"] * 5,
    }

    same, compared = compare_values(specs, exact, exact), compare_values(specs, exact, lower)

    units = exact["features_1"][:, 0].reshape(6, 4, 4) / 127
    squares = (units**2).sum(axis=2)
    expected = (squares * scales).sum(axis=1) / np.sqrt(
        squares.sum(axis=1) * (squares * scales**2).sum(axis=1)
    )
    np.testing.assert_allclose(same["features_1"], 1)
    np.testing.assert_allclose(compared["features_1"], expected, rtol=1e-6)
    np.testing.assert_allclose(compared["attention_1"], 1)  # a factor of a whole map is none
    agreement = Agreement(
        precision="bfloat16",
        records=6,
        cosine_mean={"features_1": float(compared["features_1"].mean())},
        cosine_lowest={"features_1": float(compared["features_1"].min())},
    )
    assert "mean cosine of features_1 is 0.8" in describe_shortfall(agreement)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"top1": 0.9}, "largest logit is the same for 90.0%, not 97%"),
        ({"kl_mean": 0.5}, "diverge by 0.5 nats"),
        ({"kl_mean": float("nan")}, "diverge by nan nats"),
        ({"cosine_mean": {"map": 0.9}}, "mean cosine of map is 0.9000"),
    ],
)
def test_every_limit_of_the_agreement_is_kept_or_named(changed, said):
    agreement = Agreement(
        precision="bfloat16",
        records=10,
        top1=1.0,
        kl_mean=1e-4,
        kl_largest=1e-3,
        kl_largest_key="a",
        cosine_mean={"map": 0.9999},
        cosine_lowest={"map": 0.99},
    )

    shortfall = describe_shortfall(replace(agreement, **changed))

    assert bool(shortfall) == bool(changed)
    assert said in shortfall


def gradcam_config(folder, teacher=None, **annotate):
    """Configure a pass of a small ResNet on a store of this folder."""
    if teacher is None:
        path = folder / "resnet.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(0)
            # A random network's classes are nearly tied, so its logits are spread here.
            state = build_model(CifarModelConfig(name="resnet8"), 10).network.state_dict()
            state["linear.weight"] *= 4
            save_file(state, path)
        teacher = CifarModelConfig(name="resnet8", weights=str(path))
    config = precompute_config(folder / "store", teacher)
    return replace(config, annotate=PassOptions(**annotate))


@pytest.fixture
def fast_hardware(monkeypatch):
    """Function that makes bfloat16 fast on this machine, or not."""

    def pretend(precision):
        monkeypatch.setattr(
            "permafrost.annotation.precision.fastest_precision", lambda device: precision
        )

    return pretend


def only_pass(config):
    (made,) = Store(Path(config.store.path)).open_passes()
    return made


def test_a_pass_of_lower_precision_states_its_agreement_with_float32(tmp_path):
    lower, exact = (
        gradcam_config(tmp_path, name=name, precision=name) for name in ("bfloat16", "float32")
    )
    precompute.run(lower)
    precompute.run(exact)

    store = Store(Path(lower.store.path))
    made = {p.name.rpartition("-")[0]: p for p in store.open_passes(("bfloat16", "float32"))}
    assert made["float32"].manifest.agreement is None
    agreement = made["bfloat16"].manifest.agreement
    assert agreement.precision == "bfloat16"
    assert agreement.records == min(PRECISION_RECORDS, store.num_records())
    # The store is smaller than the sample, so the passes themselves have the same numbers.
    values = [
        {
            name: np.concatenate([made[p].read_shard(s)[name] for s in store.shards])
            for name in ("logits", "map", "target_class")
        }
        for p in ("float32", "bfloat16")
    ]
    compared = compare_values(made["float32"].manifest.fields, *values)
    assert agreement.top1 == pytest.approx(compared["top1"].mean())
    assert agreement.kl_mean == pytest.approx(compared["kl"].mean())
    assert agreement.kl_largest == pytest.approx(compared["kl"].max())
    assert agreement.cosine_lowest["map"] == pytest.approx(compared["map"].min())
    assert 0 < agreement.kl_mean < 0.01
    assert 0.995 < agreement.cosine_mean["map"] < 1


@pytest.fixture
def coarse_teacher(tmp_path):
    """Teacher whose logits have a large part in common, beside which bfloat16 rounds their differences away."""
    tmp_path.mkdir(exist_ok=True)
    torch.manual_seed(0)
    path = tmp_path / "coarse.safetensors"
    state = build_model(CifarModelConfig(name="resnet8"), 10).network.state_dict()
    state["linear.weight"] += 300
    save_file(state, path)
    return CifarModelConfig(name="resnet8", weights=str(path))


def test_a_precision_too_far_from_float32_is_refused_before_anything_is_written(
    tmp_path, coarse_teacher
):
    config = gradcam_config(tmp_path, coarse_teacher, precision="bfloat16")

    with pytest.raises(
        PrecisionError, match=r"annotate\.precision=bfloat16: .* set annotate\.precision=float32"
    ):
        precompute.run(config)

    assert not list((Path(config.store.path) / "teachers").glob("*"))


def test_auto_is_float32_for_a_teacher_that_bfloat16_changes(
    tmp_path, coarse_teacher, fast_hardware, caplog
):
    fast_hardware("bfloat16")
    config = gradcam_config(tmp_path, coarse_teacher, precision="auto")
    with caplog.at_level(logging.INFO, logger="permafrost.precompute"):
        precompute.run(config)

    assert "annotate.precision=auto: float32, because with bfloat16" in caplog.text
    assert only_pass(config).manifest.teacher["dtype"] == "float32"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_auto_is_the_fastest_precision_and_later_the_precision_of_the_pass_that_exists(
    tmp_path, fast_hardware, precision
):
    fast_hardware(precision)
    config = gradcam_config(tmp_path, precision="auto")
    assert precompute.run(config).teacher_records > 0
    made = only_pass(config)
    assert made.manifest.teacher["dtype"] == precision
    assert (made.manifest.agreement is None) == (precision == "float32")

    fast_hardware({"bfloat16": "float32", "float32": "bfloat16"}[precision])
    again = precompute.run(config)

    assert again.teacher_records == 0
    assert only_pass(config).name == made.name
    explicit = precompute.run(gradcam_config(tmp_path, precision=precision))
    assert explicit.teacher_records == 0


@pytest.mark.parametrize(
    ("asked", "fastest"),
    [("float32", "float32"), slow("bfloat16", "float32"), slow("auto", "float32"), ("auto", "bfloat16")],
)  # fmt: skip
def test_a_teacher_is_described_once_whatever_its_precision(
    tmp_path, fast_hardware, monkeypatch, asked, fastest
):
    """A description hashes its weights."""
    fast_hardware(fastest)
    described = []
    describe = Network.describe

    def count(network, **options):
        described.append(network)
        return describe(network, **options)

    monkeypatch.setattr(Network, "describe", count)

    precompute.run(gradcam_config(tmp_path, precision=asked))

    assert len(described) == 1


def test_auto_goes_on_with_a_pass_that_was_begun(tmp_path, fast_hardware):
    fast_hardware("bfloat16")
    config = gradcam_config(tmp_path, precision="auto")
    precompute.run(config)
    made = only_pass(config)
    folder = Path(str(made.folder))
    sorted((folder / "commits").iterdir())[0].unlink()
    (folder / "manifest.json").unlink()

    fast_hardware("float32")
    again = precompute.run(config)

    assert 0 < again.teacher_records < Store(Path(config.store.path)).num_records()
    assert only_pass(config).name == made.name
    assert only_pass(config).manifest.agreement == made.manifest.agreement


def test_auto_compares_nothing_if_maps_take_a_float32_pass(bcos_config, fast_hardware, monkeypatch):
    fast_hardware("bfloat16")
    monkeypatch.setattr(ComparePrecision, "__call__", lambda *a: pytest.fail("compared"))

    precompute.run(bcos_config(precision="auto"))

    assert only_pass(bcos_config()).manifest.teacher["dtype"] == "float32"


@pytest.mark.parametrize("amx", [False, True])
def test_the_fastest_precision_of_a_cpu_needs_amx_and_bfloat16(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    is_supported = amx and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    expected = "bfloat16" if is_supported else "float32"
    assert fastest_precision(torch.device("cpu")) == expected


@pytest.mark.slow
def test_the_fastest_precision_of_a_cpu_needs_amx_that_onednn_may_use():
    """oneDNN reads its limit when it is loaded, so the test needs a process of its own."""
    program = (
        "import torch\n"
        "torch.cpu.get_capabilities = lambda: {'amx_bf16': True}\n"
        "from permafrost.models.compute import fastest_precision\n"
        "print(fastest_precision(torch.device('cpu')))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()

    assert printed == "float32"


# ---- memory format and compilation -----------------------------------------------------------------


FRAMES = (24, 24)


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        frames = torch.randint(0, 256, (size, 3, *FRAMES), dtype=torch.uint8, generator=generator)
        sides = torch.full((size,), 24.0)
        yield FrameBatch(frames, sides, sides, torch.arange(size) % 10)


def annotate(config, options):
    annotator = TeacherAnnotator(config.teacher, 10, config.explainer, options, FRAMES)
    return annotator, annotator.annotate(batches(8, 8, 3), [str(key) for key in range(19)])[0]


def test_another_memory_format_changes_the_last_bits_and_not_the_identity(tmp_path):
    config = gradcam_config(tmp_path)
    turned, moved = annotate(config, PassOptions(channels_last=True, map_dtype="float32"))
    plain, kept = annotate(config, PassOptions(map_dtype="float32"))

    weight = turned.model.network.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.model.network.conv1.weight.is_contiguous()
    assert TorchvisionModelConfig.suits_channels_last
    assert TimmModelConfig.suits_channels_last
    for name, values in moved.items():
        np.testing.assert_allclose(values, kept[name], rtol=2e-3, atol=2e-5, err_msg=name)
    assert not ModuleConfig.suits_channels_last
    store = Store(Path(precompute.run(config).store))
    plans = [plan_pass(gradcam_config(tmp_path, channels_last=c), store) for c in (True, False)]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_maps_that_need_a_graph_are_not_compiled(bcos_config):
    with pytest.raises(
        ConfigError, match=r"annotate\.compile=true: maps of explainer=bcos_weights"
    ):
        precompute.run(bcos_config(compile=True))

    assert precompute.run(bcos_config(outputs=("logits",))).teacher_records > 0


def test_a_teacher_that_cannot_be_compiled_ends_in_one_sentence(tmp_path, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def fails(*inputs):
        raise TorchDynamoException("no C++ compiler\nand a page of text")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: setattr(model, "forward", fails))

    with pytest.raises(
        ConfigError, match=r"cannot compile this teacher here \(no C\+\+ compiler\)"
    ):
        precompute.run(gradcam_config(tmp_path, compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_teacher_stores_the_same_values_and_is_compiled_once(tmp_path, precision):
    from torch._dynamo.utils import counters

    config = gradcam_config(tmp_path)
    options = PassOptions(batch_size=8, map_dtype="float32", precision=precision)
    _, eager = annotate(config, options)
    counters.clear()

    annotator, compiled = annotate(config, replace(options, compile=True))
    graphs = counters["stats"]["unique_graphs"]
    annotator.annotate(batches(5), [str(key) for key in range(5)])

    assert graphs == 1
    assert counters["stats"]["unique_graphs"] == 1  # sizes of batches compile nothing
    tolerance = {"float32": 1e-3, "bfloat16": 0.1}[precision]
    for name in ("logits", "map"):
        np.testing.assert_allclose(compiled[name], eager[name], rtol=tolerance, atol=tolerance)
