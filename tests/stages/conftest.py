"""Fixtures of the stages."""

import runpy

import pytest

from permafrost.config.models import CifarModelConfig
from permafrost.store.reader import Store
from tests.support.paths import ROOT
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


@pytest.fixture(autouse=True, scope="module")
def every_page(pages_drawn_quickly):
    """Draw the pages of all stages quickly."""


@pytest.fixture
def permafrost(monkeypatch, capsys):
    """A stage's command run in this process: exit status, standard output and standard error."""

    def run(verb, *words):
        monkeypatch.setattr("sys.argv", [verb, *words])
        code = 0
        try:
            runpy.run_path(str(ROOT / "stages" / f"{verb}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """Store with the passes resnet8 (first or the assistant) and resnet14, in alphabetical order."""
    path = tmp_path_factory.mktemp("taught") / "store"
    for name in ("resnet8", "resnet14"):
        teacher = CifarModelConfig(name=name, width=4, weights="random")
        precompute.run(precompute_config(path, teacher))
    return Store(path)
