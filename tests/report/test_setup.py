"""Section on what was trained on what: options by arm, commands, teachers, and the bytes that an arm needs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import yaml

from permafrost.commands import commands_of
from permafrost.config.builder import build_verb_config
from permafrost.config.compose import compose, sections
from permafrost.config.page_options import ReportOptions
from permafrost.config.runs import RUNS, save_config, to_plain_dict, unused_path
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import ReportConfig
from permafrost.core.errors import ConfigError
from permafrost.models.providers import build_model, count_parameters
from permafrost.report.passes import UsedPass
from permafrost.report.provenance import bytes_by_arm, bytes_plot, describe_teachers
from permafrost.report.student_results import UnknownRunError, load_results
from permafrost.report.training_facts import describe_augmentation, describe_data, training_facts
from permafrost.store.reader import Store
from stages import distill, evaluate, precompute, report, teach
from tests.support.run_files import write_config
from tests.support.runs import PAD_CROP, distill_config, evaluate_config
from tests.support.stores import Frozen


def report_of(frozen, run, **options):
    config = ReportConfig(
        store=StoreOptions(path=str(frozen.store.path)),
        augment=PAD_CROP,
        report=ReportOptions(**{"contact_records": 0, "cases": 0, **options}),
        run=run,
    )
    return report.run(config)


def test_options_that_differ_are_marked_and_the_others_are_stated_once(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)

    facts = training_facts(load_results("grid"), frozen.store)

    assert facts.shared["Epochs"] == "1"
    assert facts.shared["Batch size"] == "8"
    assert facts.shared["Learning rate"] == "0.003"
    assert facts.shared["Student's network"] == "resnet8 (cifar, stem stride 1, width 4)"
    assert facts.shared["Training records"] == "40 (all of split train)"
    assert facts.shared["Seeds"] == "0 (1 seed)"
    marked = {
        name: [arm.cells[place].differs for arm in facts.arms]
        for place, name in enumerate(facts.columns)
    }
    values = {arm.method: dict(zip(facts.columns, arm.cells, strict=True)) for arm in facts.arms}
    assert [name for name, cells in marked.items() if any(cells)] == ["method.kind"]
    assert values["e2kd"]["method.kind"].text == "e2kd"
    assert values["e2kd"]["method.lambda_map"].text == "1"
    assert values["kd"]["method.lambda_map"].text == ""
    assert all(name.startswith("method.") for name in facts.columns)


def test_the_data_and_the_teacher_are_described(frozen):
    data = describe_data(frozen.store)
    (teacher,) = describe_teachers([UsedPass(*frozen.store.open_passes(), ("kd", "e2kd"))])

    assert "72 records, 10 classes, frame of 16x16 pixels" in data["Data"]
    assert data["Splits"] == "teacher 12, test 10, test_swapped 10, train 40"
    assert teacher["Students"] == "kd, e2kd"
    assert teacher["Network"] == "resnet8 (cifar, stem stride 1, width 4)"
    network = build_model(frozen.config.teacher, 10).network
    assert teacher["Parameters"] == f"{count_parameters(network):,}"
    assert re.fullmatch(r"model.safetensors, sha256 [0-9a-f]{64}", teacher["Weights"])
    assert teacher["Maps"] == "gradcam of top1"


def test_an_augmentation_states_the_options_that_its_operations_read():
    assert describe_augmentation(to_plain_dict(PAD_CROP)) == "pad crop padding 2"
    assert describe_augmentation({"operations": [], "size": None}) == "none"
    assert describe_augmentation({"operations": [{"kind": "rotation", "p": 0.5, "degrees": 15.0, "padding": 4}],
                                  "mixup_alpha": 1.0}) == "rotation p 0.5 degrees 15, mixup alpha 1"  # fmt: skip
    pixels = {
        "operations": [],
        "pixels": [{"kind": "gaussian_blur", "p": 0.5, "sigma": [0.001, 0.01], "hue": 0.1}],
    }
    assert describe_augmentation(pixels) == "gaussian blur p 0.5 sigma [0.001, 0.01]"


@pytest.mark.parametrize(
    ("verb", "words", "command"),
    [
        ("sweep", ["experiment=demo"], "permafrost sweep experiment=demo"),
        (
            "sweep",
            ["experiment=demo", "seeds=[5,6]", "trainer.epochs=2"],
            "permafrost sweep experiment=demo trainer.epochs=2 'seeds=[5, 6]'",
        ),
        (
            "precompute",
            ["store.path=stores/x", "run=photos", "teacher=timm", "teacher.name=resnet50d"],
            "permafrost precompute teacher=timm store.path=stores/x teacher.name=resnet50d run=photos",
        ),
    ],
)
def test_a_command_is_found_again_from_its_config(verb, words, command):
    values = sections(verb, compose(verb, words))
    path = RUNS / values["run"] / f"{verb}.yaml"
    path.parent.mkdir(parents=True)
    write_config(path, yaml.safe_dump(values))

    (found,) = commands_of(values["run"])

    assert sorted(found.split()) == sorted(command.split())


def test_the_command_of_a_finished_student_is_found_from_the_config_next_to_its_weights(frozen):
    config = distill_config(frozen, run="alone")
    distill.run(config, on_epoch=lambda epoch, line: None)

    (command,) = commands_of("alone")

    words = shlex.split(command)
    assert words[:2] == ["permafrost", "distill"]
    again = build_verb_config("distill", compose("distill", words[2:]))
    (teacher,) = frozen.store.open_passes()
    named = replace(config, store=replace(config.store, teacher=(teacher.name,)))
    assert to_plain_dict(again) == to_plain_dict(named)  # the pass, in case the store gets another
    assert not [word for word in words if word.startswith("teacher")]  # refused without mode=live


def test_a_config_of_another_version_is_named_instead_of_a_wrong_command():
    values = sections("sweep", compose("sweep", ["experiment=demo"]))
    values["trainer"]["of_another_version"] = 3
    path = RUNS / "demo/sweep.yaml"
    path.parent.mkdir(parents=True)
    write_config(path, yaml.safe_dump(values))

    assert commands_of("demo") == ["permafrost sweep  # options: runs/demo/sweep.yaml"]


def test_an_arm_needs_the_bytes_of_the_fields_that_its_loss_reads(frozen, swept, monkeypatch):
    monkeypatch.chdir(swept)
    results = load_results("grid")

    needed = bytes_by_arm(results, frozen.store)

    (teacher,) = frozen.store.open_passes()
    sizes = {}
    for shard in teacher.manifest.shards:
        for entry in shard.files:
            field = entry.path.split("/")[1]
            sizes[field] = sizes.get(field, 0) + entry.bytes / 72
    maps = sum(sizes[field] for field in sizes if field in ("map", "map_scale", "explained_class"))
    assert needed["kd"] == pytest.approx(sizes["logits"])
    assert needed["e2kd"] == pytest.approx(sizes["logits"] + maps)
    assert maps > 0


def test_accuracy_is_plotted_against_bytes_only_where_arms_need_different_ones():
    from permafrost.report.main_table import Column

    column = Column(name="accuracy", source="test.accuracy")
    summary = [
        {"method": arm, "accuracy": {"mean": 0.5, "sd": None}} for arm in ("labels", "kd", "other")
    ]

    plot = bytes_plot(summary, column, {"labels": 0.0, "kd": 40.0})

    assert plot is not None
    assert plot.alt == "accuracy over the bytes of stored targets per record, one point per arm"
    assert bytes_plot(summary, column, {"labels": 40.0, "kd": 40.0}) is None
    assert bytes_plot(summary, column, {}) is None


# ---- the passes that students learned from -------------------------------------------------------


def run_command(verb, *words):
    """Run a stage as the command line does, which writes the composed config of a precompute to its run."""
    composed = compose(verb, list(words))
    config = build_verb_config(verb, composed)
    if verb == "precompute":
        values = sections(verb, composed)
        save_config(unused_path(RUNS / config.run / "precompute.yaml", values), values)
    {"precompute": precompute, "teach": teach, "evaluate": evaluate}[verb].run(config)
    return config


TINY_DATA_WORDS = (
    *("data=demo", "data.image_size=16", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.test_digits=10", "data.train_digits=40", "data.teacher_digits=12"),
    *("data.teacher_placements=1", "data.test_placements=1"),
)
NETWORK_WORDS = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4")
WEIGHTS = "teacher.weights=runs/taught/teach/model.safetensors"


@pytest.fixture
def learned(frozen):
    """Store with two passes of one teacher, and a student of the first pass only."""
    store = ("store.path=stores/own", "executor=serial")
    run_command("precompute", *store, *TINY_DATA_WORDS, "teacher=none", "run=packed")
    run_command(
        "teach", store[0], "run=taught", *NETWORK_WORDS, "teaching.split=teacher",
        "teaching.trainer.epochs=1", "teaching.trainer.batch_size=4", "evaluate.splits=[test]",
    )  # fmt: skip
    run_command("precompute", *store, *NETWORK_WORDS, WEIGHTS, "annotate.name=first", "run=photos")
    found = Store(Path("stores/own"))
    (first,) = found.open_passes()
    config = distill_config(Frozen(found, frozen.config), run="photos")
    distill.run(config, on_epoch=lambda epoch, line: None)
    run_command("evaluate", "store.path=stores/own", "run=photos", "evaluate.splits=[test]")
    return found, first


def own_report(**options):
    config = ReportConfig(
        store=StoreOptions(path="stores/own", **options),
        augment=PAD_CROP,
        report=ReportOptions(contact_records=0, cases=0),
        run="photos",
    )
    return Path(report.run(config).html).read_text()


def section_of_setup(html):
    return html[html.index('id="setup"') : html.index('id="training"')]


def stated_commands(html):
    (block,) = re.findall(r'aria-label="Commands">(.*?)</pre>', html, re.DOTALL)
    return unescape(block).splitlines()


def test_the_commands_of_a_student_are_those_that_made_its_store_teacher_and_pass(learned):
    commands = stated_commands(own_report())

    verbs = [command.split()[1] for command in commands]
    assert verbs == ["precompute", "teach", "precompute", "distill", "evaluate"]
    assert "data.train_digits=40" in commands[0]
    assert "teacher=none" in commands[0]
    assert "run=taught" in commands[1]
    assert "annotate.name=first" in commands[2]


def test_a_store_that_was_packed_with_its_pass_is_packed_alone_before_the_teacher(learned):
    shutil.rmtree(RUNS / "packed")
    words = [*TINY_DATA_WORDS, *NETWORK_WORDS, WEIGHTS, "annotate.name=first", "run=photos"]
    composed = compose("precompute", ["store.path=stores/own", *words])
    save_config(RUNS / "photos/precompute.yaml", sections("precompute", composed))

    commands = stated_commands(own_report())

    verbs = [command.split()[1] for command in commands]
    assert verbs == ["precompute", "teach", "precompute", "distill", "evaluate"]
    assert "data.train_digits=40" in commands[0]
    assert commands[0].endswith("teacher=none")
    assert WEIGHTS not in commands[0]
    assert WEIGHTS in commands[2]


def test_a_page_names_the_pass_that_the_student_learned_from_not_a_later_one(learned):
    store, first = learned
    run_command(
        "precompute", "store.path=stores/own", "executor=serial", *NETWORK_WORDS, WEIGHTS,
        "annotate.payloads=[logits]", "annotate.name=later", "run=photos",
    )  # fmt: skip
    (later,) = {folder.name for folder in store.pass_folders()} - {first.name}

    html = own_report()

    setup = section_of_setup(html)
    assert first.name in setup
    assert later not in setup
    commands = stated_commands(html)
    assert not any("annotate.name=later" in command for command in commands)
    assert any("annotate.name=first" in command for command in commands)
    (RUNS / "photos/precompute.yaml").unlink()
    manifest = f"stores/own/teachers/{first.name}/manifest.json"
    without = stated_commands(own_report())
    assert f"permafrost precompute  # pass {first.name}: {manifest}" in without
    with pytest.raises(ConfigError, match=rf"store\.teacher={later}: no student .*{first.name}"):
        own_report(teacher=(later,))


# ---- a student without a sweep -------------------------------------------------------------------


def test_a_student_that_was_distilled_alone_is_reported(frozen):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)

    before = report_of(frozen, "alone")
    evaluate.run(evaluate_config(frozen, run="alone", splits=("test",)))
    after = report_of(frozen, "alone")

    command = f"permafrost evaluate store.path={frozen.store.path} run=alone"
    assert before.next == command
    assert before.csv == ""
    assert after.next == ""
    values = json.loads(Path(after.json).read_text())
    (row,) = values["runs"]
    assert row["method"] == "alone"
    assert {"accuracy", "agreement", "epg", "iou"} <= set(row)
    assert "1 seed: no spread known" in values["summary"][0]
    html = Path(after.html).read_text()
    assert "Not evaluated yet" not in html
    assert '<tr data-method="alone">' in html


def test_a_student_alone_is_shown_without_the_columns_that_it_was_not_evaluated_for(frozen, caplog):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)
    evaluate.run(evaluate_config(frozen, run="alone", splits=("test",)))
    columns = {"right": "test.accuracy", "energy": "all.gradient_alignment.mask_energy"}

    with caplog.at_level("INFO"):
        found = report_of(frozen, "alone", columns=columns, paired_column="energy")

    (row,) = json.loads(Path(found.json).read_text())["runs"]
    assert "right" in row
    assert "energy" not in row
    assert "without the columns all.gradient_alignment.mask_energy" in caplog.text


def test_a_student_without_results_has_a_page_that_says_how_to_get_them(frozen):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)

    html = Path(report_of(frozen, "alone").html).read_text()

    assert "Not evaluated yet" in html
    assert f"permafrost evaluate store.path={frozen.store.path} run=alone" in html
    assert ">Training</h2>" in html
    assert ">What was trained on what</h2>" in html
    assert ">Results</h2>" not in html


def test_a_run_that_does_not_exist_is_an_error_that_names_those_that_do(frozen):
    (RUNS / "photos/distill").mkdir(parents=True)
    (RUNS / "fotos").mkdir()
    (RUNS / "fotos/report.yaml").write_text("")  # as the command line writes it first

    with pytest.raises(UnknownRunError, match=r"runs/fotos does not exist.* are: photos; correct"):
        report_of(frozen, "fotos")

    assert not (RUNS / "fotos").exists()


def test_a_report_of_the_store_alone_needs_no_run(frozen):
    html = Path(report_of(frozen, "untitled").html).read_text()

    assert ">Teacher passes</h2>" in html
    assert ">Results</h2>" not in html
