"""Suggestions for unknown options: other members, other verbs, words of other programs, never what was typed."""

import re

import pytest

import permafrost
from permafrost.config.compose import compose
from permafrost.config.sections import option_paths
from permafrost.config.verbs import VERBS
from permafrost.core.errors import ConfigError
from permafrost.core.yaml_text import parse_yaml
from tests.support.items import for_each
from tests.support.papers import needs_papers

MISTAKES = {
    # words: part of the message
    ("precompute", "data.path=photos"): "option of data=image_folder and data=image_table",
    ("precompute", "data.test_fraction=0.2"): "option of data=image_folder",
    ("distill", "student.layer=layer4"): "option of student=module",
    ("distill", "data.path=photos"): "option of preview and ",
    ("distill", "variants=x"): "option of sweep",
    ("evaluate", "split=[val]"): "(did you mean evaluate.splits='[val]'?)",
    ("evaluate", "evaluate.thresholds=val"): "(did you mean evaluate.threshold=val?)",
    ("distill", "metod=kd"): "(did you mean method=kd?)",
    ("distill", "model=resnet18"): "(did you mean student=resnet18?)",
    ("distill", "loss=kd"): "(did you mean method=kd?)",
    ("distill", "workers=4"): "(did you mean trainer.loader_processes=4?)",
    ("distill", "gpus=2"): "(did you mean trainer.ranks=2?)",
    ("distill", "teacher_pass=a"): "(did you mean store.teacher=a?)",
    ("distill", "method.tua=4"): "(did you mean method.tau=4?)",
    ("distill", "storre.path=x"): "(did you mean store.path=x?)",
    ("teach", "trainer.epochs=3"): "(did you mean teaching.trainer.epochs=3?)",
    ("distill", "student=resnet18"): "student=torchvision student.name=resnet18",
    ("distill", "run.name=x"): "unknown option run.name",
    ("sweep", "arms=[]"): "it is called variants now",
    ("precompute", "payloads=[logits]"): "it is called outputs now",
    ("distill", "teacher.outputs=probabilities"): "it is called teacher.returns now",
}


@needs_papers
@for_each("words,part", MISTAKES.items())
def test_a_mistake_is_understood(words, part):
    verb, argument = words

    with pytest.raises(ConfigError, match=re.escape(part)) as error:
        compose(verb, [argument])

    assert f"did you mean {argument.partition('=')[0]}=" not in str(error.value)


@for_each("verb", VERBS)
def test_no_suggestion_is_what_was_typed(verb):
    """Try options of every member, none of which was chosen, and of every other verb."""
    messages = {}
    for path in {path for other in VERBS for path in option_paths(other)[::7]}:
        try:
            compose(verb, [f"{path}=x"])
        except ConfigError as error:
            messages[path] = str(error)
    assert messages
    assert [path for path, text in messages.items() if f"did you mean {path}=" in text] == []


FORMER = {
    "arms: {kd: [method=kd]}": "it is called variants now",
    "annotate: {payloads: [logits]}": "it is called annotate.outputs now",
    "teacher: {kind: module, outputs: probabilities}": "it is called teacher.returns now",
    "annotate: {outputs: [logits, map]}": "among logits, maps, ",
}


@for_each("written,part", FORMER.items())
def test_a_former_name_is_refused_with_the_new_one(written, part, tmp_path):
    (tmp_path / "old.yaml").write_text(written)
    verb = permafrost.sweep if "arms" in written else permafrost.precompute
    named = ["store.path=s", "run=one"] + ([] if "teacher" in written else ["teacher=none"])
    for options in ({"experiment": str(tmp_path / "old.yaml")}, parse_yaml(written)):
        with pytest.raises(ConfigError, match=part):
            verb(*named, **options)


def test_a_path_is_taken_for_that_of_a_store():
    assert compose("distill", ["store=stores/demo"])["store"]["path"] == "stores/demo"
    assert compose("distill", ["store=zarr"])["store"]["backend"] == "zarr"


@needs_papers
def test_options_of_an_experiment_that_another_member_lacks_are_left_out_and_named(caplog):
    with caplog.at_level("INFO"):
        composed = compose("distill", ["experiment=demo", "student=module"])

    assert "width" not in composed["student"]
    assert (
        "options of experiment=demo that student=module does not have are left out: width"
        in caplog.text
    )
    assert compose("distill", ["experiment=demo"])["student"]["width"]
