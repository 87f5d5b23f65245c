"""Plug-ins: a method and a network of the user's own module, trained, evaluated and loaded again."""

import sys

import pytest

from pipeline.config.builder import build_verb_config
from pipeline.config.compose import compose
from pipeline.config.methods import METHODS
from pipeline.config.models import MODELS
from pipeline.config.plugins import load_plugins
from pipeline.config.runs import RUNS
from pipeline.core.errors import ConfigError
from pipeline.models.saved import read_description
from stages import distill, evaluate
from tests.support.pages import blocks_of
from tests.support.paths import ROOT

NETWORK = """

from pipeline.config.models import MODELS, CifarModelConfig


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(CifarModelConfig):
    kind: Literal["narrow"] = "narrow"
    width: int = 4


MODELS["narrow"] = NarrowConfig
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Module my_losses of the page, with a network, in a folder of the import path; it is forgotten after the test."""
    (block,) = blocks_of(ROOT / "docs" / "howto" / "plug-ins.md", "python")
    (tmp_path / "my_losses.py").write_text(block.code + NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PERMAFROST_PLUGINS", "my_losses")
    before = dict(METHODS), dict(MODELS)
    yield
    for family, members in zip((METHODS, MODELS), before, strict=True):
        family.clear()
        family.update(members)
    sys.modules.pop("my_losses", None)


def test_a_method_and_a_network_of_a_plugin_are_options_like_any_other(plugin, frozen):
    load_plugins()
    words = [f"store.path={frozen.store.path}", "run=plugged"]
    config = build_verb_config(
        "distill",
        compose(
            "distill",
            [
                *(*words, "method=squared_error", "method.scale=0.5", "student=narrow"),
                *("student.name=resnet8", "trainer.epochs=1", "trainer.batch_size=8"),
            ],
        ),
    )

    distill.run(config)
    results = evaluate.run(
        build_verb_config("evaluate", compose("evaluate", [*words, "evaluate.splits=[test]"]))
    )

    assert config.method.scale == 0.5
    assert 0 <= results.splits["test"]["accuracy"] <= 1
    assert read_description(RUNS / "plugged" / "distill").config.kind == "narrow"


def test_a_network_whose_plugin_is_not_named_is_an_error_that_says_so(plugin, frozen):
    test_a_method_and_a_network_of_a_plugin_are_options_like_any_other(plugin, frozen)
    del MODELS["narrow"]

    with pytest.raises(ConfigError, match=r"kind narrow.*PERMAFROST_PLUGINS"):
        read_description(RUNS / "plugged" / "distill")


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv("PERMAFROST_PLUGINS", "no_such_module")

    with pytest.raises(ConfigError, match="plug-in no_such_module cannot be imported"):
        load_plugins()
