"""Precision of a pass: one forward pass of the teacher, and a fingerprint that names what was computed."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.teacher_pass import plan_pass
from permafrost.config.explainers import BcosWeightsConfig, GradCamConfig
from permafrost.config.models import BcosModelConfig
from permafrost.config.store import PassOptions
from permafrost.models.bcos.provider import BcosClassifier
from permafrost.models.explanations import pass_precision
from permafrost.models.providers import build_model
from permafrost.store.frames import FrameBatch
from permafrost.store.reader import Store
from stages import precompute
from tests.support.stores import precompute_config

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
    ("payloads", "explainer", "precision"),
    [
        (("logits", "map"), BcosWeightsConfig(), "float32"),
        (("logits",), BcosWeightsConfig(), "bfloat16"),
        (("logits", "map"), GradCamConfig(), "bfloat16"),
    ],
)
def test_only_maps_that_are_gradients_of_the_whole_network_take_a_float32_pass(
    payloads, explainer, precision
):
    options = PassOptions(payloads=payloads, precision="bfloat16")

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
    logits_alone = plan_pass(bcos_config(precision="bfloat16", payloads=("logits",)), store)
    assert logits_alone.description["teacher"]["dtype"] == "bfloat16"


def test_logits_beside_maps_are_those_of_float32(bcos_config):
    """Control: without maps, bfloat16 rounds them."""
    logits = {}
    for name, options in {
        "with_map": {"precision": "bfloat16"},
        "exact": {"payloads": ("logits",)},
        "rounded": {"payloads": ("logits",), "precision": "bfloat16"},
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
