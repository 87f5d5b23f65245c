"""JSON Schema of experiments, and completion of command lines by the shells themselves."""

import json
import os
import shutil
import subprocess
import sys

import jsonschema
import pytest

from permafrost.config.plugins import load_plugins
from permafrost.config.sections import experiment_files
from permafrost.core.yaml_text import read_values
from permafrost_shell.completion import SCRIPTS, candidates
from permafrost_shell.schema import experiment_schema
from tests.support.papers import needs_papers
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def validator():
    schema = experiment_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema, allow_nan=False)
    return jsonschema.Draft202012Validator(schema)


def problems(validator, text):
    return [list(map(str, error.path)) for error in validator.iter_errors(read_values(text))]


@needs_papers
def test_every_experiment_fits_the_schema(validator):
    for path in experiment_files().values():
        assert problems(validator, path.read_bytes()) == [], path


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("metod: kd", []),
        ("method: kdd", ["method"]),
        ("method: {kind: kd, tua: 3}", ["method"]),
        ("method: {kind: kd, tau: 0}", ["method"]),
        ("trainer: {epochs: many}", ["trainer"]),
        ("seeds: [a]", ["seeds", "0"]),
        ("augment: {operations: [{kind: wobble}]}", ["augment"]),
        ("evaluate: {knn: {k: [1], kk: 2}}", ["evaluate", "knn"]),
        ("subset: {shots: 0}", ["subset", "shots"]),
        ("mode: livid", ["mode"]),
    ],
)
def test_a_mistake_does_not_fit_and_is_located(validator, text, path):
    assert path in problems(validator, text)


def test_members_of_a_plugin_are_in_the_schema(tmp_path, monkeypatch):
    from permafrost.config.methods import METHODS

    (tmp_path / "loss_of_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar, Literal\n"
        "from permafrost.config.methods import METHODS, KDConfig\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config(KDConfig):\n"
        "    implementation: ClassVar[str] = 'loss_of_a_test:Loss'\n"
        "    kind: Literal['mine'] = 'mine'\n"
        "    strength: float = 1.0\n"
        "METHODS['mine'] = Config\n"
    )
    monkeypatch.chdir(tmp_path)
    try:
        load_plugins(["loss_of_a_test.py"])
        plugged = jsonschema.Draft202012Validator(experiment_schema())
        assert problems(plugged, "method: {kind: mine, strength: 2}") == []
        assert problems(plugged, "method: {kind: mine, strenght: 2}") == [["method"]]
        assert candidates(["distill", "method=mi"]) == ["method=mine"]
        assert candidates(["distill", "method=mine", "method.str"]) == ["method.strength="]
    finally:
        METHODS.pop("mine", None)
        sys.modules.pop("loss_of_a_test", None)


@needs_papers
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dis"], ["distill"]),
        (["distill", "method=k"], ["method=kd", "method=ked"]),
        (["distill", "trainer.prec"], ["trainer.precision="]),
        (["distill", "method=e2kd", "method.map_control=un"], ["method.map_control=unaugmented"]),
        (["teach", "teaching.optimizer=s"], ["teaching.optimizer=sgd"]),
        (["distill", "trainer.compile="], ["trainer.compile=true", "trainer.compile=false"]),
        (["distill", "experiment=own_data/e"], ["experiment=own_data/embedding"]),
        (["nothing", "method="], []),
        (["distill", "run="], []),
    ],
)
def test_candidates_are_members_options_and_values(words, expected):
    assert candidates(words) == expected


BASH = """
source <(permafrost-shell completion bash)
complete_line() { COMP_LINE="$1"; COMP_POINT=${#1}; _permafrost; printf '%s\\n' "${COMPREPLY[@]}"; }
complete_line "permafrost distill method=k"
complete_line "permafrost distill trainer.prec"
complete_line "permafrost dis"
"""
FISH = """
permafrost-shell completion fish | source
complete -C "permafrost distill method=k"
complete -C "permafrost distill trainer.prec"
complete -C "permafrost dis"
"""
EXPECTED = {
    "bash": ["kd", "ked", "trainer.precision=", "distill"],
    "fish": ["method=kd", "method=ked", "trainer.precision=", "distill"],
}


@needs_papers
@pytest.mark.parametrize(("shell", "script"), [("bash", BASH), ("fish", FISH)])
def test_a_shell_completes_a_line(tmp_path, shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "permafrost-shell"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m permafrost_shell "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    done = subprocess.run(
        [shell, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)},
    )

    assert done.stdout.split() == EXPECTED[shell], done.stderr


def test_each_shell_has_a_script_that_names_the_command():
    assert set(SCRIPTS) == {"bash", "zsh", "fish"}
    assert all("permafrost-shell completion words" in script for script in SCRIPTS.values())
