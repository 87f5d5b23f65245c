"""Composition of words, experiments and defaults: recorded values, what each form of a word means, and the identity."""

import dataclasses
import json
from pathlib import Path

import pytest

from permafrost.config.builder import to_plain_dict
from permafrost.config.compose import compose
from permafrost.config.distillation import DistillConfig
from permafrost.config.sections import GROUPS, group_members
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import ConfigError
from permafrost.core.yaml_text import YamlError, dump_yaml, parse_yaml, read_values
from permafrost.runs.folder import identity, save_options
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import read_yaml
from tests.config import compositions
from tests.config.compositions import changes, record_of
from tests.support.composition import config_of
from tests.support.items import for_each
from tests.support.papers import needs_papers

_TOO_DEEP = "more than 24 levels|maximum nesting depth"
"""Messages of texts of thousands of levels: ours, and that of libyaml from PyYAML 6.0.4 on, which looks ahead."""


@needs_papers
def test_values_of_every_experiment_are_those_that_were_recorded():
    changed = changes()

    command = "python -m tests.config.compositions --write"
    assert not changed, "\n".join(
        [f"if these new values are wanted, run {command}; otherwise correct them:", *changed]
    )


def test_a_changed_option_of_an_experiment_is_named(monkeypatch):
    first = record_of("demo")
    monkeypatch.setattr(compositions, "experiments", lambda: ["demo"])
    monkeypatch.setattr(compositions, "RECORD", Path("record.json"))
    old = {"": record_of(""), "demo": first | {"trainer.epochs": "other"}}
    Path("record.json").write_text(json.dumps(old))

    assert changes() == ["demo: trainer.epochs"]


def test_a_composition_is_the_callers_own():
    compose("sweep", ["experiment=demo"])["seeds"].append(99)
    compose("sweep", ["experiment=demo"])["report"]["columns"]["x"] = "y"

    assert 99 not in compose("sweep", ["experiment=demo"])["seeds"]
    assert "x" not in compose("sweep", ["experiment=demo"])["report"]["columns"]


@for_each(
    "word,message",
    [
        ("method.tua=4", "unknown option method.tua"),
        ("seeds=[", r"cannot read seeds=\[: did not find expected"),
        ("variants={a:[method=kd]}", r"write a space after each colon"),
        ("seeds=&a [*a]", "seeds must be a list"),
        ("seeds=[&a 1]", r"cannot read seeds=\[&a 1\]: it has an anchor or an alias"),
        ("+method.tau=4", r"takes no \+method\.tau="),
        ("~method.tau", "options are written key=value"),
    ],
)
def test_a_word_that_cannot_be_read_is_one_line(word, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config_of("sweep", "experiment=demo", word)

    assert "\n" not in str(caught.value)


def test_a_mapping_replaces_that_of_the_experiment_and_one_entry_is_added():
    replaced = ["experiment=demo", "report.columns={f1: test.f1}", "report.compared_column=f1"]
    added = ["experiment=demo", "report.columns.f1=test.f1"]

    assert compose("report", replaced)["report"]["columns"] == {"f1": "test.f1"}
    columns = compose("report", added)["report"]["columns"]
    assert columns["f1"] == "test.f1"
    assert "epg" in columns


def test_a_mapping_of_a_section_sets_its_options():
    words = ["subset={shots: 5}", "student={kind: torchvision, name: resnet18}"]

    composed = compose("distill", words)

    assert composed["subset"]["shots"] == 5
    assert composed["subset"]["holdout"] == compose("distill", [])["subset"]["holdout"]
    assert (
        composed["student"]
        == compose("distill", ["student=torchvision", "student.name=resnet18"])["student"]
    )


def test_an_integer_that_no_float_holds_is_an_error():
    composed = compose("distill", ["experiment=demo", f"optimizer.lr={10**399}"])

    with pytest.raises(ConfigError, match=r"optimizer\.lr must be a number of at most 1\.8e\+308"):
        build_verb_config("distill", composed)


@pytest.mark.parametrize(
    "text", ["no", "1e5", "010", "2026-11-25", "on", "0x10", "1_000", "~x", "a: b", "[a"]
)
def test_a_text_option_keeps_the_characters_as_typed(text, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"data: {{kind: image_folder, only_classes: ['{text}', b]}}\nrun: '{text}'\n")

    assert compose("distill", [f"run={text}"])["run"] == text
    assert compose("distill", [f"run='{text}'"])["run"] == text
    assert compose("distill", [f"experiment={path}"])["run"] == text
    if text[0] != "[" and ": " not in text:  # in a list, these are YAML's own
        words = ["data=image_folder", f"data.only_classes=[{text}, b]"]
        assert compose("precompute", words)["data"]["only_classes"] == [text, "b"]
        path.write_text(f"data: {{kind: image_folder, only_classes: [{text}, b]}}\nrun: {text}\n")
        assert compose("distill", [f"experiment={path}"])["run"] == text
        assert compose("precompute", [f"experiment={path}"])["data"]["only_classes"] == [text, "b"]


@for_each(
    "text,value", [("1e-3", 0.001), (".5", 0.5), ("3", 3), ("1.0", 1.0), ("+2", 2), ("1E+2", 100.0)]
)
def test_a_number_reads_what_yaml_1_2_reads(text, value):
    assert compose("distill", [f"optimizer.lr={text}"])["optimizer"]["lr"] == value


def test_an_option_without_its_section_is_that_of_the_only_section_that_has_it():
    assert compose("distill", ["lr=0.5", "tau=3"]) == compose(
        "distill", ["optimizer.lr=0.5", "method.tau=3"]
    )
    with pytest.raises(
        ConfigError, match=r"name is an option of student, teacher; write student\.name= or"
    ):
        compose("distill", ["teacher=cifar", "name=resnet8"])
    with pytest.raises(
        ConfigError, match=r"takes no epochs= \(did you mean teaching\.trainer\.epochs="
    ):
        compose("teach", ["epochs=5"])


def test_an_experiment_is_refused_in_one_line(tmp_path):
    path = tmp_path / "own.yaml"
    for text, message in {
        "- a": "must be a mapping of sections",
        "metod: kd": r"there is no section metod \(did you mean method\?\)",
        "defaults: [demo]": r"write bases: \[\.\.\.\]",
        "bases: demo": r"bases must be a list of at most 8 experiments, as in \[demo\]",
        "bases: [demoo]": r"experiment=demoo does not exist \(did you mean demo\?\)",
        "teacher: [kd]": r"teacher must be a section of options, got \['kd'\]",
        "method: kdd": r"method=kdd does not exist \(did you mean kd\?\)",
        "teaching: {optimizer: sdg}": r"teaching\.optimizer=sdg does not exist \(did you mean sgd\?\)",
        "run: x\nrun: y": "it has the name 'run' twice",
        "method: &a {tau: 1}\n": "it has an anchor",
        "run: !!python/object:os.system x": "it has the tag",
        "seeds: " + "[" * 300: "it has more than 24 levels",
        "seeds: " + "[" * 3000: _TOO_DEEP,
        "a: b: c": r"mapping values are not allowed in this context \(line 1, column 5\)",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            config_of("distill", f"experiment={path}")
        assert "\n" not in str(caught.value)


def test_experiments_that_are_based_on_each_other_end(tmp_path):
    names = [str(tmp_path / f"{letter}.yaml") for letter in "abcdefghij"]
    for name, base in zip(names, [*names[1:], names[0]], strict=True):
        Path(name).write_text(f"bases: ['{base}', '{base}']\nrun: {Path(name).stem}\n")

    with pytest.raises(ConfigError, match="is based on itself or on too many others"):
        compose("distill", [f"experiment={names[0]}"])

    Path(names[2]).write_text("run: end\nseed: 7\n")
    composed = compose("distill", [f"experiment={names[0]}"])
    assert (composed["run"], composed["seed"]) == ("a", 7)


# ---- names ---------------------------------------------------------------------------------------


@for_each(
    "run,message",
    [
        ("", "distill needs run=, as in run=photos"),
        (".", r"run=\. is not a name"),
        ("../../evil", r"run=\.\./\.\./evil leaves its folder"),
        ("a/../../b", "leaves its folder"),
        ("a\0b", r"run=a\\x00b has control characters"),
        ("a\nb", r"run=a\\nb has control characters"),
        ("x" * 300, r"run=x+\.\.\. has 300 bytes of at most 200"),
        ("é" * 150, "has 300 bytes"),
    ],
)
def test_a_name_of_a_run_that_no_folder_may_have_is_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        config_of("distill", f"run={run}")


@for_each("run", ["a", "ked/digits", "/tmp/a b/c", "s3://bucket/a/b", "ü.1", "..a"])
def test_other_names_are_taken(run):
    assert config_of("distill", f"run={run}").run == run


@for_each(
    "variant,message",
    [
        ("../../evil", r"variants=\.\./\.\./evil leaves its folder|is a path"),
        ("a/b", "variants=a/b is a path; write a name without slashes"),
        ("x" * 300, "has 300 bytes"),
        ("a\\nb", "has control characters"),
    ],
)
def test_a_name_of_a_variant_is_the_name_of_a_folder(variant, message):
    with pytest.raises(ConfigError, match=message):
        config_of("sweep", f'variants={{"{variant}": [method=kd]}}')


# ---- YAML of strangers ---------------------------------------------------------------------------

BILLION = "a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@for_each(
    "text,message",
    [
        (BILLION, "anchor or an alias"),
        ("<<: {a: 1}\n<<: {b: 2}", "twice"),
        ("x: " + "[" * 5000, _TOO_DEEP),
        ("x: " + "{a: " * 5000, _TOO_DEEP),
        ("[" * 5000, _TOO_DEEP),
        ("a: !!binary aGk=", "tag"),
        ("{[1]: 2}", "as a name"),
        ("a: 1\n--- \nb: 2\n", "several documents"),
        ("a: \x00", "unacceptable character"),
        ("x" * (2**20 + 1), "bytes, of at most"),
        ("a:1: {b:2}", "did not find|mapping values|space after the colon"),
    ],
)
def test_yaml_of_a_stranger_is_refused_in_one_line_before_it_grows(text, message):
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text)

    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@for_each(
    "values",
    [
        {"a": ["no", "010", "1e5", "null", "", "~", "2026-11-25", "a: b", "#", "ü", " x ", "-"]},
        {"b": [1, 2.5, 1e-7, -3, True, False, None, float("inf")], "c": {}, "d": []},
        {"e": {"f": "several\nlines\n", "g": "'quoted'", "h": '"', "i": "{a: 1}", "j": "x" * 300}},
        {"k" * 200: 1, "no": "yes", "l": [["m"], {"n": ["o"]}]},
    ],
)
def test_what_is_dumped_is_read_as_it_was(values):
    assert read_values(dump_yaml(values)) == values
    assert read_values(json.dumps(values).replace("Infinity", ".inf")) == values


@for_each("section", ["augment", "store", "trainer"])
def test_every_option_of_a_section_of_files_is_one_of_each_of_its_members(section):
    names = {field.name for field in dataclasses.fields(GROUPS[section])}
    for member in group_members(section):
        assert compose("distill", [f"{section}={member}"])[section].keys() == names


def test_an_identity_has_every_option_that_changes_results_also_at_its_default():
    config = config_of("distill", "store.teacher=[first]")
    values = to_plain_dict(config)

    found = identity(values | {"inputs": {"store": "fingerprint"}}, DistillConfig)

    assert set(found) == {*values, "inputs"} - {"cluster", "curve", "logger", "command"}
    assert found["store"] == {}
    (operation,) = values["augment"]["operations"][:1]
    assert set(operation) - set(found["augment"]["operations"][0]) == {"padding_mode"}
    assert values["augment"].keys() - found["augment"].keys() == {"mix"}  # after files without it
    assert set(values["student"]) - set(found["student"]) == {"weights", "weights_key", "sha256"}
    assert "epochs" in found["trainer"]
    assert "log_every_steps" not in found["trainer"]


def test_a_repeated_call_keeps_its_first_words_and_each_call_of_precompute_its_own_file():
    for verb in ("precompute", "sweep"):
        path = RUNS / "one" / f"{verb}.yaml"
        save_options(path, {"run": "one", "seed": 0}, [verb, "run=one"])
        save_options(path, {"run": "one", "seed": 0}, [verb, "seed=0", "run=one"])
        assert read_yaml(path, "")["command"] == [verb, "run=one"]

        save_options(path, {"run": "one", "seed": 1}, [verb, "seed=1"])

    assert sorted(path.name for path in (RUNS / "one").iterdir()) == [
        "precompute-2.yaml", "precompute.yaml", "sweep.yaml",
    ]  # fmt: skip
    assert read_yaml(RUNS / "one/precompute.yaml", "")["command"] == ["precompute", "run=one"]
    assert read_yaml(RUNS / "one/sweep.yaml", "")["command"] == ["sweep", "seed=1"]
