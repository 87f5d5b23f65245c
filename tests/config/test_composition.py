"""Composition of words and conf/: the same values as Hydra's own, whichever words were composed before."""

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from permafrost.config.builder import build_verb_config
from permafrost.config.compose import _sets_a_value, compose, register_defaults
from permafrost.config.environment import CONF
from permafrost.core.errors import ConfigError
from tests.stages.test_recipes import EVERY_RECIPE, commands

WORDS = {
    "a value": ["experiment=demo", "method.tau=4"],
    "the last of two": ["experiment=demo", "trainer.epochs=3", "trainer.epochs=5"],
    "a value before its group": ["method.tau=4", "method=kd", "experiment=demo"],
    "a list": ["experiment=e2kd/table1", "seeds=[1,2]", "evaluate.splits=[test]"],
    "a mapping within a section": ["evaluate.group_sets={a: [1]}", "experiment=demo"],
    "text with spaces": ["experiment=demo", "report.title='a b'", "store.path='/x y'"],
    "null": ["experiment=demo", "subset.shots=null"],
    "a member for the experiment's": [
        "experiment=cifar10_bcos",
        "student=torchvision",
        "method=kd",
    ],
    "a member and values of two files": ["experiment=ked/digits_retrained", "student=saved"],
    "members alone": ["student=timm", "teacher=saved", "method=at", "optimizer=sgd"],
    "members within a section": [
        "augment@teaching.augment=pad_crop_flip",
        "optimizer@teaching.optimizer=sgd",
        "teaching=ked",
    ],
    "a section for the experiment's": ["experiment=ked/cifar10_trunk", "teaching=labels"],
    "a member that is based on another": ["experiment=demo", "store=webdataset"],
    "a new key": ["experiment=demo", "+report.columns.f1=test.f1"],
}
QUICK = ("a member and values of two files", "a member that is based on another", "a new key")
"""Words that `make test` compares with Hydra."""
VERBS = {"report": "report", "teaching": "teach"}
"""Verbs that read a section, by its name; sweeps read the others."""


def hydras_values(words):
    register_defaults(words)
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        return OmegaConf.to_container(hydra_compose("config", overrides=words), resolve=True)


@pytest.mark.parametrize(
    "words",
    [pytest.param(WORDS[name], marks=[] if name in QUICK else pytest.mark.slow) for name in WORDS],
    ids=WORDS,
)
def test_values_are_hydras(words):
    verb = next((verb for name, verb in VERBS.items() if name in "".join(words)), "sweep")

    assert compose(verb, words) == hydras_values(words)


@pytest.mark.slow
def test_values_of_every_recipe_are_hydras():
    """Each file of conf/experiment/, alone and with the members that the commands in its header choose."""
    verbs = {(f"experiment={recipe}",): "sweep" for recipe in EVERY_RECIPE}
    for recipe in EVERY_RECIPE:
        for verb, *words in commands(recipe):
            verbs[tuple(word for word in words if not _sets_a_value(word))] = verb
    assert len(verbs) > len(EVERY_RECIPE)

    for words, verb in verbs.items():
        assert compose(verb, words) == hydras_values(list(words)), words


def test_a_composition_is_the_callers_own():
    compose("sweep", ["experiment=demo"])["seeds"].append(99)

    assert 99 not in compose("sweep", ["experiment=demo"])["seeds"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method.tua=4", "unknown option method.tua"),
        ("method.tau=[", "cannot read 'method.tau=\\['"),
    ],
)
def test_errors_are_those_of_the_whole_composition(word, message):
    compose("sweep", ["experiment=demo"])

    with pytest.raises(ConfigError, match=message):
        compose("sweep", ["experiment=demo", word])


def test_a_mapping_replaces_that_of_the_experiment():
    words = ["experiment=demo", "report.columns={f1: test.f1}", "report.paired_column=f1"]

    assert compose("report", words)["report"]["columns"] == {"f1": "test.f1"}


def test_an_integer_that_no_float_holds_is_an_error():
    composed = compose("distill", ["experiment=demo", f"optimizer.lr={10**400}"])

    with pytest.raises(ConfigError, match=r"optimizer\.lr must be a number of at most 1\.8e\+308"):
        build_verb_config("distill", composed)
