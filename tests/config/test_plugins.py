"""Plug-ins: members of the user's own modules in every family and every option that takes them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from permafrost.config.builder import build_verb_config
from permafrost.config.compose import compose
from permafrost.config.data import SOURCES
from permafrost.config.evaluation import EVALUATORS
from permafrost.config.explainers import EXPLAINERS
from permafrost.config.methods import METHODS
from permafrost.config.models import MODELS, TimmModelConfig
from permafrost.config.plugins import load_plugins
from permafrost.config.reference import describe_verb
from permafrost.config.runs import RUNS
from permafrost.config.store import PAYLOADS
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model, published
from permafrost.models.saved import read_description
from permafrost.store.reader import Store
from stages import distill, evaluate, precompute, report, sweep, teach
from tests.support.pages import blocks_of
from tests.support.paths import ROOT

STAGES = {
    "precompute": precompute,
    "teach": teach,
    "distill": distill,
    "evaluate": evaluate,
    "report": report,
}
FAMILIES_OF_USERS = (METHODS, MODELS, SOURCES, EVALUATORS, EXPLAINERS, PAYLOADS)
OPTIONS = {
    "method": "squared_error",
    "student": "three_layers",
    "teacher": "three_layers",
    "black_box": "three_layers",
    "data": "stripes",
    "explainer": "energy",
}
EPOCH = ["trainer.epochs=1", "trainer.batch_size=8"]
READERS = {"method": "distill", "student": "distill", "teacher": "precompute", "black_box": "teach"}
TIMM_NETWORK = """
import timm
from torch import nn


@timm.models.register_model
def permafrost_test_network(pretrained=False, **options):
    network = timm.create_model("test_resnet", **options)
    network.default_cfg = network.pretrained_cfg = {}
    return network
"""


def modules_of_the_page():
    """The modules of the page, by the name under which their options find them."""
    losses, members, measures = blocks_of(ROOT / "docs" / "howto" / "plug-ins.md", "python")
    return {
        "my_losses": losses.code,
        "my_members": members.code,
        "my_measures": measures.code,
    }


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Modules of the page in a folder of the import path, loaded; they are forgotten after the test."""
    modules = modules_of_the_page()
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PERMAFROST_PLUGINS", ",".join(modules))
    before = [dict(members) for members in FAMILIES_OF_USERS]
    load_plugins()
    yield
    for members, own in zip(FAMILIES_OF_USERS, before, strict=True):
        for name in members.keys() - own.keys():
            del members[name]
    for name in modules:
        sys.modules.pop(name, None)


def run_stage(verb, *words):
    return STAGES[verb].run(build_verb_config(verb, compose(verb, words)))


@pytest.mark.parametrize(("option", "kind"), OPTIONS.items())
def test_every_option_knows_the_members_of_plugins(plugin, option, kind):
    verb = READERS.get(option, "precompute")

    shown = describe_verb(verb, compose(verb, [f"{option}={kind}"]))

    assert f"{option}.kind={kind}" in shown
    with pytest.raises(ConfigError, match=rf"{option}=no_such does not exist; .*{kind}"):
        compose(verb, [f"{option}=no_such"])


def test_members_of_plugins_go_through_all_stages(plugin):
    words = ["store.path=store", "run=plugged"]
    teacher = ["teacher=three_layers", "teacher.width=4"]
    weights = "runs/plugged/teach/model.safetensors"
    taught = [f"teaching.{word}" for word in EPOCH]
    arms = "arms={mine: [method=squared_error, method.scale=0.5], e2kd: [method=e2kd]}"
    sweep_words = [
        *(*words, *EPOCH, "student=three_layers", "student.width=4", "seeds=[0]", arms),
        *("evaluate.splits=[test]", "evaluate.num_pictures=2", "executor=serial"),
    ]

    packed = run_stage("precompute", *words, "data=stripes", "teacher=none", "executor=serial")
    run_stage("teach", *words, *teacher, *taught, "evaluate.splits=[test]")
    measured = ["explainer=energy", "annotate.payloads=[logits,map,margin]"]
    taught_pass = [*words, *teacher, f"teacher.weights={weights}", *measured]
    run_stage("precompute", *taught_pass, "executor=serial")
    swept = sweep.run(build_verb_config("sweep", compose("sweep", sweep_words)), sweep_words)
    judged = run_stage(
        *("evaluate", *words, *teacher, f"teacher.weights={weights}", "model=teacher"),
        *("evaluate.splits=[test]", "evaluators=[accuracy,localization,confidence]"),
        "evaluate.confidence.threshold=0",
    )
    run_stage("report", *words)

    assert packed.packed_records == 96
    assert swept.finished_now == 2
    assert 0 <= judged.splits["test"]["accuracy"] <= 1
    assert judged.splits["test"]["confidence"] == {"confident": 1}
    for row in json.loads((RUNS / "plugged" / "sweep.json").read_text())["runs"]:
        assert read_description(RUNS / row["run"] / "distill").config.kind == "three_layers"
    (teacher_pass,) = Store(Path("store")).open_passes()
    assert "margin" in [field.name for field in teacher_pass.manifest.fields]
    page = (RUNS / "plugged" / "report.html").read_text()
    assert "three_layers" in page
    assert "squared_error" in page


def test_superfeatures_are_found_in_a_network_of_a_plugin(plugin):
    words = ["store.path=store", "run=grouped", "evaluate.splits=[test]"]
    epoch = ["teaching.trainer.epochs=1", "teaching.trainer.batch_size=8"]
    run_stage("precompute", *words[:2], "data=stripes", "teacher=none", "executor=serial")
    black_box = ["black_box=three_layers", "black_box.width=4", "black_box.weights=random"]
    additive = ["teacher=additive", "teacher.name=mlp", "teacher.superfeatures=2"]
    search = ["teaching=ked", "teaching.levels=2", "teaching.records=32", "teaching.max_records=32"]

    run_stage("teach", *words, *epoch, *black_box, *additive, "teacher.input_size=16", *search)

    assert read_description(RUNS / "grouped" / "teach").config.kind == "additive"


def test_a_network_whose_plugin_is_not_named_is_an_error_that_says_so(plugin, frozen):
    words = [f"store.path={frozen.store.path}", "run=plugged", "method=labels"]
    run_stage("distill", *words, "student=three_layers", *EPOCH)
    del MODELS["three_layers"]

    with pytest.raises(ConfigError, match=r"kind three_layers.*PERMAFROST_PLUGINS"):
        read_description(RUNS / "plugged" / "distill")


def test_a_network_registered_with_timm_needs_no_published_weights(tmp_path, monkeypatch):
    (tmp_path / "my_timm_networks.py").write_text(TIMM_NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PERMAFROST_PLUGINS", "my_timm_networks")
    load_plugins()
    config = TimmModelConfig(name="permafrost_test_network", mean=(0.5,) * 3, std=(0.5,) * 3)

    model = build_model(config, 10)

    assert published(config) is None
    assert model(torch.rand(2, 3, 32, 32)).logits.shape == (2, 10)
    with pytest.raises(ConfigError, match="has no default mean and std"):
        build_model(replace(config, mean=None, std=None), 10)
    with pytest.raises(ConfigError, match="timm has no weights of permafrost_test_network"):
        build_model(replace(config, weights="pretrained"), 10)


@pytest.mark.slow
@pytest.mark.ray
def test_members_of_plugins_run_on_ray_from_a_folder_outside(tmp_path):
    modules = modules_of_the_page()
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    own = {**os.environ, "PYTHONPATH": path, "PERMAFROST_PLUGINS": ",".join(modules)}
    words = ["store.path=store", "run=plugged"]
    teacher = ["teacher=three_layers", "teacher.weights=random"]
    epoch = ["trainer.epochs=1", "trainer.batch_size=8", "seeds=[0,1]"]
    arms = "arms={mine: [method=squared_error], e2kd: [method=e2kd]}"

    def command(verb, *more):
        subprocess.run(
            [sys.executable, "-m", f"stages.{verb}", *words, *more],
            cwd=tmp_path,
            env=own,
            check=True,
            timeout=240,
        )

    command("precompute", "data=stripes", *teacher, "executor=ray")
    command("sweep", "student=three_layers", *epoch, "evaluate.splits=[test]", arms, "executor=ray")
    command("report")

    assert len(json.loads((tmp_path / "runs/plugged/sweep.json").read_text())["runs"]) == 4
    assert (tmp_path / "runs/plugged/report.html").is_file()


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv("PERMAFROST_PLUGINS", "no_such_module")

    with pytest.raises(ConfigError, match="plug-in no_such_module cannot be imported"):
        load_plugins()
