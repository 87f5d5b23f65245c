"""Fixtures of the stages."""

import runpy

import pytest

from tests.support.paths import ROOT


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
