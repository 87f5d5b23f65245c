"""Section on what was trained on what: options by variant, commands and teachers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest

from permafrost.cli import stage_main
from permafrost.config.builder import to_plain_dict
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.evaluation.results import read_results
from permafrost.models.cost import count_parameters
from permafrost.models.providers import build_model
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from permafrost_report.passes import UsedPass
from permafrost_report.provenance import describe_teachers
from permafrost_report.run_commands import commands_of
from permafrost_report.student_results import UnknownRunError, load_results
from permafrost_report.training_facts import describe_augmentation, describe_data, training_facts
from tests.support.runs import PAD_CROP, distill_config, evaluate_config, report_config
from tests.support.stores import Frozen
from tests.support.sweeps import read_sweep, sweep_arguments
from tests.support.verbs import distill, evaluate, report
from tests.support.words import TINY_DATA, TINY_NETWORK


def report_of(frozen, run, **options):
    return report.run(report_config(frozen, run, **options))


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
        name: [variant.cells[place].differs for variant in facts.variants]
        for place, name in enumerate(facts.columns)
    }
    values = {v.method: dict(zip(facts.columns, v.cells, strict=True)) for v in facts.variants}
    assert [name for name, cells in marked.items() if any(cells)] == ["method.kind"]
    assert values["e2kd"]["method.kind"].text == "e2kd"
    assert values["e2kd"]["method.lambda_map"].text == "1"
    assert values["kd"]["method.lambda_map"].text == ""
    assert all(name.startswith("method.") for name in facts.columns)


def test_the_data_and_the_teacher_are_described(frozen):
    data = describe_data(frozen.store)
    (teacher,) = describe_teachers([UsedPass(*frozen.store.open_passes(), ("kd", "e2kd"))])

    assert (
        "72 records, 10 classes, images of 16x16 (store.image_size, store.format=original)"
        in data["Data"]
    )
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
    mixed = {
        "operations": [{"kind": "rotation", "p": 0.5, "degrees": 15.0, "padding": 4}],
        "mix": [{"kind": "mixup", "alpha": 1.0, "p": 1.0}],
    }
    assert describe_augmentation(mixed) == "rotation p 0.5 degrees 15, mixup alpha 1 p 1"
    pixels = {
        "operations": [{"kind": "gaussian_blur", "p": 0.5, "sigma": [0.001, 0.01], "hue": 0.1}]
    }
    assert describe_augmentation(pixels) == "gaussian blur p 0.5 sigma [0.001, 0.01]"


# ---- the passes that students learned from -------------------------------------------------------


def run_command(verb, *words):
    """Run a stage as the command line does, and return the command as it is typed in a shell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"permafrost {verb}", *words])
        stage_main(verb)
    return shlex.join(["permafrost", verb, *words])


WEIGHTS = "teacher.weights=runs/taught/teach/model.safetensors"


@pytest.fixture(scope="module")
def folder_of_learned(frozen, tmp_path_factory):
    """Folder of the store and the runs of `learned`, and the commands that made them."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, learn(frozen)


@pytest.fixture
def learned(folder_of_learned):
    """Store with one pass of a teacher, the pass, and the commands that made them and a student."""
    folder, made_by = folder_of_learned
    shutil.copytree(folder, ".", dirs_exist_ok=True)
    found = Store(Path("stores/own"))
    (first,) = found.open_passes()
    return found, first, made_by


def learn(frozen):
    """Pack a store, train a teacher, make its pass, train a student and evaluate it, and return the commands."""
    store = ("store.path=stores/own", "executor=serial")
    packing = run_command("precompute", *store, *TINY_DATA, "teacher=none", "run=packed")
    teaching = run_command(
        "teach", store[0], "run=taught", *TINY_NETWORK, "teaching.split=teacher",
        "teaching.trainer.epochs=1", "teaching.trainer.batch_size=4", "evaluate.splits=[test]",
    )  # fmt: skip
    making = run_command(
        "precompute", *store, *TINY_NETWORK, WEIGHTS, "annotate.name=first", "run=photos"
    )
    config = distill_config(Frozen(Store(Path("stores/own")), frozen.config), run="photos")
    distill.run(config, on_epoch=lambda epoch, line: None)
    evaluating = run_command("evaluate", store[0], "run=photos", "evaluate.splits=[test]")
    training = "permafrost distill  # options: runs/photos/distill/config.yaml"
    return [packing, teaching, making, training, evaluating]


def own_report(command=(), **options):
    store = StoreOptions(path="stores/own", **options)
    return Path(report.run(report_config(None, "photos", command, store=store)).html).read_text()


def stated_commands(html):
    (block,) = re.findall(r'aria-label="Commands">(.*?)</pre>', html, re.DOTALL)
    return unescape(block).splitlines()


def test_the_commands_of_a_student_are_those_that_made_its_store_teacher_and_pass(learned):
    *_, commands = learned

    assert stated_commands(own_report()) == commands


def test_the_commands_of_a_page_repeat_its_numbers_in_an_empty_folder(
    learned, tmp_path, monkeypatch
):
    labels = ("method=labels", "student=cifar", "student.name=resnet8", "student.width=4")
    run_command("distill", "store.path=stores/own", "run=labels", "trainer.epochs=1", *labels)
    run_command("distill", "store.path=stores/own", "run=later", "trainer.epochs=1", *labels[1:])
    run = ("store.path=stores/own", "run=later")
    run_command("evaluate", *run, "evaluate.splits=[test]", "evaluate.region=masks")
    run_command(
        "evaluate", *run, "evaluate.splits=[test]", "evaluators=[distance_correlation]",
        "evaluate.distance_correlation.baseline=labels", "teacher=saved", WEIGHTS,
        "evaluate.distance_correlation.permutations=19",
    )  # fmt: skip
    before = read_results(RUNS / "later/evaluate")["splits"]
    asked = ("evaluators=[distance_correlation]", "evaluate.distance_correlation.permutations=19")
    run_command("evaluate", *run[:1], "run=labels", "evaluate.splits=[test]", *asked)
    assert WEIGHTS in commands_of("labels", Store(Path("stores/own")).open_passes())[-1]

    config = report_config(None, "later", store=StoreOptions(path="stores/own"))
    commands = stated_commands(Path(report.run(config).html).read_text())

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for command in commands:
        run_command(*shlex.split(command)[1:])
    assert read_results(RUNS / "later/evaluate")["splits"] == before


def test_a_damaged_file_of_another_run_is_a_warning_and_the_report_is_made(learned, caplog):
    caplog.set_level("WARNING", "permafrost.verbs.next_commands")
    *_, commands = learned
    damaged = RUNS / "abandoned/precompute.yaml"
    damaged.parent.mkdir()
    damaged.write_bytes(
        (RUNS / "photos/precompute.yaml").read_bytes().replace(b"photos", b"others")
    )

    html = own_report()

    assert stated_commands(html) == commands
    assert str(damaged) in caplog.text


def test_a_training_with_other_words_is_the_same_run_and_keeps_those_of_its_first_command(frozen):
    words = (
        f"store.path={frozen.store.path}", "run=alone", "trainer.epochs=1", "trainer.batch_size=8",
        "student.name=resnet8", "student.width=4", "student=cifar",
    )  # fmt: skip
    first = run_command("distill", *words)
    config = (RUNS / "alone/distill/config.yaml").read_bytes()

    again = run_command("distill", *reversed(words))

    assert again != first
    assert (RUNS / "alone/distill/config.yaml").read_bytes() == config
    assert commands_of("alone") == [first.replace(str(frozen.store.path), "store")]


def test_a_sweep_and_its_students_have_its_command_with_its_experiment_and_its_quotes(frozen):
    Path("my own.yaml").write_text("run: quoted\nmode: frozen\n")
    words = [word for word in sweep_arguments(frozen) if not word.startswith("run=")]
    variants = "variants={tau 4: ['method=kd', 'method.tau=4']}"

    command = run_command("sweep", "experiment=my own.yaml", *words, variants)

    (student,) = (row["run"] for row in read_sweep("quoted")["runs"])
    assert shlex.split(command)[-1] == variants
    shown = command.replace(str(frozen.store.path), "store")
    assert commands_of("quoted") == commands_of(student) == [shown]


@pytest.mark.slow
def test_a_page_names_the_pass_that_the_student_learned_from_not_a_later_one(learned):
    store, first, made = learned
    run_command(
        "precompute", "store.path=stores/own", "executor=serial", *TINY_NETWORK, WEIGHTS,
        "annotate.outputs=[logits]", "annotate.name=later", "run=photos",
    )  # fmt: skip
    (later,) = {folder.name for folder in store.pass_folders()} - {first.name}

    html = own_report()

    setup = html[html.index('<h2 id="setup"') :].split("<h2")[1]
    assert first.name in setup
    assert later not in setup
    assert stated_commands(html) == made
    (RUNS / "photos/precompute.yaml").unlink()
    manifest = f"stores/own/teachers/{first.name}/manifest.json"
    without = stated_commands(own_report())
    assert f"permafrost precompute  # pass {first.name}: {manifest}" in without
    with pytest.raises(ConfigError, match=rf"store\.teacher={later}: no student .*{first.name}"):
        own_report(teacher=(later,))


# ---- a student without a sweep -------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_that_was_distilled_alone_is_reported(frozen):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)

    before = report_of(frozen, "alone")
    evaluate.run(evaluate_config(frozen, run="alone", splits=("test",)))
    after = report_of(frozen, "alone")

    command = f"permafrost evaluate store.path={frozen.store.path} run=alone"
    assert before.next == command
    assert before.csv == ""
    assert after.next == "permafrost export run=alone"
    values = json.loads(Path(after.json).read_text())
    (row,) = values["runs"]
    assert row["method"] == "alone"
    assert {"accuracy", "agreement", "epg", "iou"} <= set(row)
    assert "1 seed: no spread known" in values["summary"][0]
    html = Path(after.html).read_text()
    assert "Not evaluated yet" not in html
    assert '<tr data-method="alone">' in html


@pytest.mark.slow
def test_a_student_alone_is_shown_without_the_columns_that_it_was_not_evaluated_for(frozen, caplog):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)
    evaluate.run(evaluate_config(frozen, run="alone", splits=("test",)))
    columns = {"right": "test.accuracy", "energy": "all.gradient_alignment.mask_energy"}

    with caplog.at_level("INFO"):
        found = report_of(frozen, "alone", columns=columns, compared_column="energy")

    (row,) = json.loads(Path(found.json).read_text())["runs"]
    assert "right" in row
    assert "energy" not in row
    assert "without the columns all.gradient_alignment.mask_energy" in caplog.text


@pytest.mark.slow
def test_a_student_without_results_has_a_page_that_says_how_to_get_them(frozen):
    distill.run(distill_config(frozen, run="alone"), on_epoch=lambda epoch, line: None)

    html = Path(report_of(frozen, "alone").html).read_text()

    assert "Not evaluated yet" in html
    assert "permafrost evaluate store.path=store run=alone" in html
    assert ">Training</h2>" in html
    assert ">What was trained on what</h2>" in html
    assert "<summary>Facts about the training of alone, of its first student</summary>" in html
    assert "targets: entropy" in html
    assert ">Results</h2>" not in html


def test_a_run_that_does_not_exist_is_an_error_that_names_those_that_do(frozen):
    (RUNS / "photos/distill").mkdir(parents=True)
    (RUNS / "fotos").mkdir()
    (RUNS / "fotos/report.yaml").write_text("")  # as the command line writes it first

    with pytest.raises(UnknownRunError, match=r"runs/fotos does not exist.* are: photos; correct"):
        report_of(frozen, "fotos")

    assert not (RUNS / "fotos").exists()


def test_a_report_of_the_store_alone_needs_no_run(frozen):
    html = Path(report_of(frozen, "").html).read_text()

    assert ">Teacher passes</h2>" in html
    assert ">Results</h2>" not in html


def test_the_first_report_of_a_run_states_its_own_command(learned):
    *_, commands = learned
    command = ("report", "store.path=stores/own", "run=photos")

    first = own_report(command=command)
    second = own_report(command=command)

    assert stated_commands(first) == [*commands, f"permafrost {' '.join(command)}"]
    assert stated_commands(second) == stated_commands(first)
