"""Weights of other trainings in the stages: what is said of them, and which store and run they belong to."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.models import CifarModelConfig
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model
from permafrost.storage.files import file_at
from permafrost.store.reader import Store
from permafrost.training.teacher_training import TeacherPlan
from tests.support.run_files import read_signed
from tests.support.verbs import precompute, teach

NETWORK = CifarModelConfig(name="resnet8", width=4)
TRAINER = TrainerOptions(epochs=1, batch_size=16, num_threads=1)


@pytest.fixture
def checkpoint(tmp_path):
    """File of a network of 12 classes, its last weights beside the averaged ones, and the states of both."""
    torch.manual_seed(5)
    last, averaged = (build_model(NETWORK, 12).network.state_dict() for _ in range(2))
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": last, "state_dict_ema": averaged, "epoch": 3}, path)
    return path, last, averaged


def teach_config(frozen, start, run="teacher", **options):
    return TeachConfig(
        store=frozen.config.store,
        teacher=replace(NETWORK, **options),
        # So small a rate leaves the weights where they start.
        teaching=LabelTeachingConfig(
            start=str(start), trainer=TRAINER, optimizer=OptimizerOptions(lr=1e-12)
        ),
        evaluate=EvaluateOptions(splits=("test",)),
        run=run,
    )


def test_a_training_says_what_it_starts_from_and_starts_from_it(frozen, checkpoint, caplog):
    caplog.set_level(logging.INFO)
    path, last, averaged = checkpoint

    result = teach.run(teach_config(frozen, path))
    of_last = teach.run(teach_config(frozen, path, "last", weights_key="state_dict"))

    assert f"teaching=labels, from {path} weights: " in caplog.text
    for weights, start in ((result.weights, averaged), (of_last.weights, last)):
        trained = load_file(weights)
        assert torch.allclose(trained["conv1.weight"], start["conv1.weight"], atol=1e-6)
        assert trained["linear.weight"].shape == (10, 16)
    configs = [Path(done.weights).parent / "config.yaml" for done in (result, of_last)]
    starts = [yaml.safe_load(config.read_text())["inputs"]["start"] for config in configs]
    assert starts == [f"{file_at(path).sha256()} {key}" for key in ("state_dict_ema", "state_dict")]


def test_a_training_with_another_key_is_another_run(frozen, checkpoint):
    teach.run(teach_config(frozen, checkpoint[0]))

    with pytest.raises(
        ConfigError, match=r"contains a run with .*start sha256 \w+ state_dict_ema -> "
    ):
        teach.run(teach_config(frozen, checkpoint[0], weights_key="state_dict"))


def test_the_start_of_a_training_comes_before_published_weights_in_the_plan(frozen):
    config = teach_config(frozen, "mine.pth", weights="pretrained:IMAGENET1K_V1")

    plan = TeacherPlan(config, Path("runs/teacher/teach"), frozen.store)

    assert plan.describe_work()["weights"] == "mine.pth"


def test_a_taught_network_is_read_whatever_key_its_start_had(frozen, own, checkpoint):
    result = teach.run(teach_config(frozen, checkpoint[0], weights_key="state_dict"))
    teacher = replace(NETWORK, weights=result.weights, weights_key="state_dict")

    made = precompute.run(replace(own.config, teacher=teacher))

    assert made.teacher_records == 72


def test_each_key_of_a_file_has_a_pass_of_its_own(own, tmp_path):
    torch.manual_seed(5)
    last, averaged = (build_model(NETWORK, 10).network.state_dict() for _ in range(2))
    path = tmp_path / "two.pth"
    torch.save({"model": last, "model_ema": averaged}, path)
    of_average = replace(NETWORK, weights=str(path))
    before = set(Store(Path(own.config.store.path)).pass_folders())

    for teacher in (of_average, of_average, replace(of_average, weights_key="model")):
        precompute.run(replace(own.config, teacher=teacher))

    passes = set(Store(Path(own.config.store.path)).pass_folders()) - before
    assert {read_signed(p / "manifest.json")["teacher"]["weights_key"] for p in passes} == {
        "model",
        "model_ema",
    }
    assert len(passes) == 2
