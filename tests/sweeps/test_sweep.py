"""Sweeps: grids, selection of points, and the splits that each step may read."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.store import StoreOptions
from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluator import METRICS
from permafrost.runs.mirrors import RUNS
from permafrost.storage.signed_files import write_json
from permafrost.sweeps import student_task
from permafrost.sweeps.plan import plan_students
from permafrost.sweeps.runner import estimate_seconds
from permafrost_report.student_results import load_results
from tests.support.growing import TEACHER, Pictures, growing_options
from tests.support.processes import descendants, environment, status, title, wait_until
from tests.support.runs import report_config
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.sweeps import (
    TINY,
    TWO_VARIANTS,
    read_sweep,
    run_sweep,
    sweep_arguments,
    sweep_config,
)
from tests.support.verbs import precompute, report, sweep


def planned(frozen, *more):
    base = sweep_arguments(frozen, *more)
    return [(s.variant, s.point) for s in plan_students(sweep_config(base), base)]


@pytest.fixture
def evaluations(monkeypatch):
    """Replace training and evaluation by a table of values by (split, tau), and return the evaluated (split, run)."""
    values = {("holdout", 1): 0.9, ("holdout", 5): 0.6, ("test", 1): 0.2, ("test", 5): 0.8}
    taus, evaluated = {}, []

    def train(config, on_epoch):
        taus[config.run] = config.method.tau

    def evaluator(config, name):
        evaluated.extend((split, config.run) for split in config.evaluate.splits)
        tau = taus[config.run]
        metrics = {
            split: {
                "records": 10,
                "accuracy": values[split, tau],
                "kl_to_teacher": values[split, tau],
            }
            for split in config.evaluate.splits
        }
        path = RUNS / config.run / name / "metrics.json"
        path.parent.mkdir(parents=True)
        done = {
            evaluator: {"options": {}, "files": {}} for evaluator in config.requested_evaluators
        }
        write_json(path, {"evaluators": done, "splits": metrics})

    monkeypatch.setattr(student_task, "distill_student", train)
    monkeypatch.setattr(student_task, "evaluate_student", evaluator)
    return evaluated


# ---- the grid ------------------------------------------------------------------------------------


def test_every_variant_takes_the_options_of_the_grid_that_its_method_knows(frozen):
    points = planned(
        frozen,
        "variants={labels: ['method=labels'], kd: ['method=kd'], e2kd: ['method=e2kd']}",
        "grid={method.tau: [1, 5], method.lambda_map: [2, 3]}",
    )

    assert [point for variant, point in points if variant == "labels"] == [{}]
    assert [point for variant, point in points if variant == "kd"] == [
        {"method.tau": 1},
        {"method.tau": 5},
    ]
    assert [point for variant, point in points if variant == "e2kd"] == [
        {"method.tau": tau, "method.lambda_map": weight} for tau in (1, 5) for weight in (2, 3)
    ]


def test_a_choice_of_group_decides_which_options_are_known(frozen):
    points = planned(
        frozen,
        "variants={a: []}",
        "grid={method.tau: [1, 5], method: [labels, kd], split: [train]}",
    )

    assert [point for _, point in points] == [
        {"method": "labels", "split": "train"},
        {"method": "kd", "split": "train", "method.tau": 1},
        {"method": "kd", "split": "train", "method.tau": 5},
    ]


def test_the_grid_reaches_the_student_and_is_stronger_than_its_variant(frozen):
    base = sweep_arguments(
        frozen,
        "variants={kd: ['method=kd', 'method.tau=9']}",
        "grid={method.tau: [1, 5]}",
        "seeds=[3,4]",
    )

    students = plan_students(sweep_config(base), base)

    assert [(s.distill.seed, s.distill.method.tau) for s in students] == [
        (3, 1.0), (3, 5.0), (4, 1.0), (4, 5.0),
    ]  # fmt: skip
    assert len({student.name for student in students}) == 4


@pytest.mark.parametrize(
    ("words", "threads", "evaluating"),
    [
        (["executor=ray"], 1, 1),
        (["executor=ray", "cluster.cpus_per_student=3.5"], 3, 3),
        (["executor=ray", "cluster.cpus_per_student=5", "trainer.loader_processes=2"], 2, 5),
        (["executor=ray", "trainer.decode_threads=6"], 6, 1),
        (["executor=ray", "evaluate.decode_threads=6"], 1, 6),
        (["executor=serial"], None, None),
    ],
)
def test_students_that_run_at_once_decode_on_their_own_cores(frozen, words, threads, evaluating):
    base = sweep_arguments(frozen, "variants={kd: ['method=kd']}", *words)

    (student,) = plan_students(sweep_config(base), base)

    assert student.distill.trainer.decode_threads == threads
    assert student.evaluate.evaluate.decode_threads == evaluating


def test_without_a_grid_a_student_is_called_what_it_always_was(frozen):
    """Names are hashes of configs, so students that were finished before grids existed stay finished."""
    plain, chosen = (
        plan_students(sweep_config(base), base)
        for base in (
            sweep_arguments(frozen, TWO_VARIANTS, "subset.holdout=1"),
            sweep_arguments(
                frozen, TWO_VARIANTS, "subset.holdout=1", "select=holdout.accuracy", "parallel=7"
            ),
        )
    )

    assert [student.name for student in plain] == [student.name for student in chosen]


def test_a_grid_that_is_typed_replaces_another():
    first, second = "grid={method.tau: [1, 5]}", "grid={optimizer.lr: [1e-3]}"

    assert sweep_config([TWO_VARIANTS, first, second]).grid == {"optimizer.lr": (0.001,)}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{method.tua: [1]}", r"no variant has the option method\.tua"),
        (
            "{evaluate.frame: [full]}",
            r"evaluate\.frame is not an option of a student; .*method, augment",
        ),
        ("{seed: [1, 2]}", "grid: seed is not an option of a student"),
        ("{method.tau: []}", r"grid\.method\.tau is empty"),
        ("{method.tau: 5}", r"grid\.method\.tau must be a list, got 5"),
        ("{method.tau: [1, 5, 1.0]}", r"grid\.method\.tau lists a value twice: \[1, 5, 1\.0\]"),
        ("{method.tau: [1, '1']}", r"method\.tau must be a number, got '1'"),
        ("{curve.splits: [test, [test]]}", r"two points result in the same student of variant kd"),
        ("{method.tau: [-1]}", r"method\.tau must be > 0"),
        ("{optimizer: [adamx]}", "did you mean adam"),
    ],
)
def test_a_mistake_in_the_grid_is_found_before_anything_is_trained(frozen, grid, message):
    with pytest.raises(ConfigError, match=message):
        planned(frozen, TWO_VARIANTS, f"grid={grid}")


# ---- choosing ------------------------------------------------------------------------------------


SEARCH = (TWO_VARIANTS, "grid={method.tau: [1, 5]}", "subset.holdout=1", "seeds=[0,1]")


def test_the_best_on_the_holdout_is_chosen_whatever_the_test_split_would_say(frozen, evaluations):
    result = run_sweep(sweep_arguments(frozen, *SEARCH, "select=holdout.accuracy"))

    table = read_sweep()
    assert [(row["variant"], row["seed"], row["point"]) for row in table["runs"]] == [
        (variant, seed, {"method.tau": 1}) for seed in (0, 1) for variant in ("kd", "e2kd")
    ]
    assert (table["select"], len(table["candidates"])) == ("holdout.accuracy", 8)
    assert {(c["point"]["method.tau"], c["value"], c["chosen"]) for c in table["candidates"]} == {
        (1, 0.9, True),
        (5, 0.6, False),
    }
    assert [run for split, run in evaluations if split == "test"] == [
        r["run"] for r in table["runs"]
    ]
    assert (result.students, result.finished_now) == (8, 8)
    *table, remark = result.summary.splitlines()[1:]
    assert remark == "+- is the standard deviation over seeds"
    assert [line.split() for line in table] == [
        ["variant", "seeds", "holdout.accuracy", "test.accuracy"],
        ["kd", "tau=1", "2", "90.0", "+-", "0.0", "20.0", "+-", "0.0"],
        ["e2kd", "tau=1", "2", "90.0", "+-", "0.0", "20.0", "+-", "0.0"],
    ]


def test_where_lower_is_better_the_lowest_is_chosen(frozen, evaluations):
    run_sweep(sweep_arguments(frozen, *SEARCH, "select=holdout.kl_to_teacher"))

    assert {row["point"]["method.tau"] for row in read_sweep()["runs"]} == {5}


def test_a_search_goes_on_where_it_stopped_and_evaluators_nothing_twice(
    frozen, evaluations, monkeypatch, caplog
):
    base = sweep_arguments(frozen, *SEARCH, "select=holdout.accuracy")
    evaluator, left = student_task.evaluate_student, [3]

    def interrupted(config, name):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        evaluator(config, name)

    monkeypatch.setattr(student_task, "evaluate_student", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(base)
    monkeypatch.setattr(student_task, "evaluate_student", evaluator)
    assert len(evaluations) == 3

    # Of the three students that were evaluated before, two are chosen and now evaluated on test.
    caplog.set_level("INFO", "permafrost.sweep")
    result = run_sweep(base)
    assert result.finished_now == 8 - 3 + 2
    lines = [record.getMessage() for record in caplog.records]
    phases = [line.partition(",")[0] for line in lines if "students to evaluate" in line]
    assert phases == [
        "5 of 8 students to evaluate on holdout",
        "4 of 4 students to evaluate on test",
    ]
    assert any("evaluated on test (4 of 4)" in line for line in lines)
    assert run_sweep(base).finished_now == 0
    assert len(evaluations) == len(set(evaluations)) == 8 + 4


def test_a_variant_with_a_failed_student_is_not_chosen_from(frozen, evaluations, monkeypatch):
    train = student_task.distill_student

    def failing(config, on_epoch):
        if config.method.kind == "e2kd" and config.method.tau == 5 and config.seed == 1:
            raise ValueError("out of luck")
        train(config, on_epoch)

    monkeypatch.setattr(student_task, "distill_student", failing)
    base = sweep_arguments(frozen, *SEARCH, "select=holdout.accuracy")

    with pytest.raises(sweep.SweepError, match=r"1 of 8 students failed.*e2kd-seed1.*out of luck"):
        run_sweep(base)

    assert {row["variant"] for row in read_sweep()["runs"]} == {"kd"}
    assert not [run for split, run in evaluations if split == "test" and "e2kd" in run]
    monkeypatch.setattr(student_task, "distill_student", train)
    run_sweep(base)
    assert {row["variant"] for row in read_sweep()["runs"]} == {"kd", "e2kd"}


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "select=holdout.accuracy": r"subset\.holdout=0 holds out no records.*subset\.holdout=10",
        "select=test.accuracy": r"test is one of evaluate\.splits",
        "select_epoch=test_swapped.accuracy evaluate.splits=[test,test_swapped]": r"accuracy: test_swapped is one of",
        "select=train.accuracy": r"students are trained on train.*subset\.holdout=10",
        "select=validation.accuracy": "no split 'validation'; its splits are: .*test_swapped",
        "select=test_swapped.acuracy": "names an unknown metric; choose one of accuracy, ",
        "select=holdout": r"select must be <split>\.<metric>, as in holdout\.accuracy; got holdout",
        "trainer.ranks=2 executor=ray": "trainer.ranks=2 in variant kd: .*executor=serial",
        "evaluate.splits=[val]": "evaluate.splits names val, but the splits of .*test_swapped",
        "parallel=0": "parallel must be >= 1 or null, got 0",
        "evaluators=[top_k] evaluate.top_k.k=[10]": r"top_k\.k=\[10\] must have numbers from 1 to 9",
        "evaluators=[unicam] evaluate.unicam.baseline=lables": "=lables is neither a variant .e2kd, kd",
    }.items(),
)
def test_a_selection_that_cannot_be_is_refused_before_anything_is_trained(
    frozen, evaluations, options, message
):
    with pytest.raises(ConfigError, match=message):
        run_sweep(sweep_arguments(frozen, TWO_VARIANTS, *options.split()))
    assert not evaluations


def test_a_metric_that_the_evaluation_does_not_have_is_named(frozen, evaluations):
    with pytest.raises(
        ConfigError, match=r"has no agreement; choose one of accuracy, kl_to_teacher"
    ):
        run_sweep(sweep_arguments(frozen, *SEARCH, "select=holdout.agreement"))


# ---- while others work, and what a reader must know ------------------------------------------------


def test_students_of_a_sweep_keep_to_the_generations_of_its_start_and_others_are_marked(
    tmp_path, monkeypatch
):
    pictures, store = Pictures(tmp_path / "pictures"), tmp_path / "store"
    pictures.add_all("abcdef")
    packing = growing_options(pictures, store, teacher=TEACHER)
    precompute.run(packing)
    train, evaluated = student_task.distill_student, []

    def append_after_the_first(config, on_epoch):
        train(config, on_epoch)
        if not evaluated:
            pictures.add_all("ghijkl")
            precompute.run(replace(packing, store=replace(packing.store, append=True)))
        evaluated.append(config.run)

    monkeypatch.setattr(student_task, "distill_student", append_after_the_first)
    words = [
        *(f"store.path={store}", *TINY, "executor=serial", "trainer.batch_size=4"),
        *("seeds=[0,1]", "variants={labels: ['method=labels']}", "evaluate.splits=[train]"),
    ]
    result = run_sweep([*words, "run=first"])
    again = run_sweep([*words, "run=first"])
    other = run_sweep([*words, "run=second", "seeds=[1]"])

    def steps(run):
        folders = [RUNS / row["run"] / "distill" for row in read_sweep(run)["runs"]]
        return {json.loads((path / "model.json").read_text())["steps"] for path in folders}

    assert (steps("first"), steps("second")) == ({3}, {6})
    assert again.trained_now == 0
    assert "different records" not in result.summary + other.summary
    shown = {"store": StoreOptions(path=str(store)), "runs": ("second",)}
    both = report.run(report_config(None, "first", **shown))
    assert "first: labels (0), first: labels (1) | second: labels (1)" in both.summary


def test_a_tie_is_said_where_a_point_is_chosen(frozen, evaluations, monkeypatch, caplog):
    run_sweep(sweep_arguments(frozen, *SEARCH, "select=holdout.accuracy"))
    assert "the same" not in caplog.text
    (RUNS / "grid").rename(RUNS / "before")
    values = {"holdout": 0.5, "test": 0.1}

    def equal(config, name):
        metrics = {
            split: {"records": 4, "accuracy": values[split]} for split in config.evaluate.splits
        }
        write_json(RUNS / config.run / name / "metrics.json", {
            "evaluators": {each: {"options": {}, "files": {}} for each in config.requested_evaluators},
            "splits": metrics,
        })  # fmt: skip

    monkeypatch.setattr(student_task, "evaluate_student", equal)
    result = run_sweep(sweep_arguments(frozen, *SEARCH, "select=holdout.accuracy"))

    assert "variant kd: 2 grid points have the same holdout.accuracy, 0.5000" in caplog.text
    sentence = "kd: tau=1, tau=5 have the same holdout.accuracy, and the first is selected."
    assert sentence in result.summary
    assert sentence in sweep_report(frozen)[0]["selection"]["ties"]


def test_a_report_shows_finished_students_while_others_are_trained(
    frozen, evaluations, monkeypatch
):
    seen, evaluate = [], student_task.evaluate_student

    def look(config, name):
        if evaluations:
            values, _ = sweep_report(frozen)
            seen.append((len(values["runs"]), values["summary"][0]))
        evaluate(config, name)

    monkeypatch.setattr(student_task, "evaluate_student", look)
    monkeypatch.setattr("permafrost_report.page._metric_lines", lambda results: {})
    monkeypatch.setattr("permafrost_report.page.training_curves", lambda lines, colors: [])
    run_sweep(sweep_arguments(frozen, "variants={kd: []}", "seeds=[0,1,2]"))

    sentence = "The sweep has not finished: {} of 3 students are evaluated."
    assert seen == [(number, sentence.format(number)) for number in (1, 2)]
    assert "not finished" not in str(sweep_report(frozen)[0]["summary"])


@pytest.mark.parametrize(("epochs", "executor"), [(1, "serial"), (100_000, "ray")])
def test_small_sweeps_stay_in_one_process(frozen, monkeypatch, epochs, executor):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    base = sweep_arguments(frozen, TWO_VARIANTS, f"trainer.epochs={epochs}", "executor=auto")
    config = sweep_config(base)
    runs = [student.final_run() for student in plan_students(config, base)]

    chosen, reason = ExecutorChoice("auto", config.cluster).for_tasks(
        len(runs), None, lambda: estimate_seconds(runs)
    )

    assert chosen.name == executor
    assert reason.endswith("than Ray takes to start" if epochs == 1 else "students at once")


# ---- real students -------------------------------------------------------------------------------


def sweep_report(frozen, run="grid", **options):
    columns = {"accuracy": "test.accuracy"}
    result = report.run(report_config(frozen, run, columns=columns, **options))
    return json.loads(Path(result.json).read_text()), Path(result.html).read_text()


def test_students_are_searched_chosen_evaluated_and_reported(frozen):
    base = sweep_arguments(
        frozen, TWO_VARIANTS, "grid={method.lambda_map: [1, 20]}", "subset.holdout=1",
        "select=holdout.accuracy", "evaluate.splits=[test]",
    )  # fmt: skip

    run_sweep(base)
    values, html = sweep_report(frozen)

    candidates = read_sweep()["candidates"]
    assert len(candidates) == 3
    for candidate in candidates:
        folder = RUNS / candidate["run"]
        evaluated = json.loads((folder / "select" / "holdout" / "metrics.json").read_text())[
            "splits"
        ]
        assert list(evaluated) == ["holdout"]
        assert evaluated["holdout"]["records"] == 10
        assert evaluated["holdout"]["accuracy"] == candidate["value"]
        assert (folder / "evaluate").exists() == candidate["chosen"]
        of_many = {name for name in METRICS if name == "f1" or name.startswith("macro_")}
        assert set(METRICS) - of_many <= set(evaluated["holdout"])
    # Without a label, as each variant has one point.
    assert [row["method"] for row in values["runs"]] == ["kd", "e2kd"]
    assert [row["variant"] for row in values["selection"]["candidates"]] == ["kd", "e2kd", "e2kd"]
    assert ">Selection</h2>" in html
    assert html.count("<td>chosen</td>") == 2
    assert 'aria-label="holdout.accuracy over ' in html
    assert 'aria-label="Explanation maps"' in html


def test_without_a_selection_a_report_keeps_points_apart(frozen, evaluations, monkeypatch):
    run_sweep(sweep_arguments(frozen, *SEARCH))
    monkeypatch.setattr("permafrost_report.page._metric_lines", lambda results: {})
    monkeypatch.setattr("permafrost_report.page.training_curves", lambda lines, colors: [])

    values, html = sweep_report(frozen)
    named, _ = sweep_report(frozen, candidate="e2kd tau=5", baseline="kd tau=1")

    assert {row["method"]: row["accuracy"] for row in values["runs"]} == {
        "kd tau=1": 0.2, "kd tau=5": 0.8, "e2kd tau=1": 0.2, "e2kd tau=5": 0.8,
    }  # fmt: skip
    assert "candidate_minus_baseline" not in values
    assert ">Selection</h2>" not in html
    assert named["candidate_minus_baseline"]["mean"] == pytest.approx(0.6)


def evaluation_files():
    """Bytes by path of all files in the folders of the students."""
    paths = (RUNS / "grid").glob("students/*/*/**/*")
    return {path: path.read_bytes() for path in paths if path.is_file()}


def shown_folders():
    return set(read_sweep()["evaluations"].values())


def test_a_sweep_is_evaluated_in_two_frames_and_trained_once(frozen):
    base = sweep_arguments(frozen, TWO_VARIANTS, "evaluate.splits=[test]")
    crop = [*base, "evaluate.frame=center_crop"]

    first, before = run_sweep(base), evaluation_files()
    second, cropped, folders = run_sweep(crop), sweep_report(frozen)[0], shown_folders()
    third, whole = run_sweep(base), sweep_report(frozen)[0]

    assert [r.trained_now for r in (first, second, third)] == [2, 0, 0]
    assert [r.finished_now for r in (first, second, third)] == [2, 2, 0]
    after = evaluation_files()
    assert {path: after[path] for path in before} == before
    assert (folders, shown_folders()) == ({"evaluate-on-test-center_crop"}, {"evaluate"})
    results = [[row["accuracy"] for row in values["runs"]] for values in (cropped, whole)]
    for accuracies, name in zip(results, (*folders, "evaluate"), strict=True):
        paths = [RUNS / row["run"] / name / "metrics.json" for row in read_sweep()["runs"]]
        found = [json.loads(path.read_text())["splits"]["test"]["accuracy"] for path in paths]
        assert accuracies == found
    (kd, _) = load_results("grid")
    assert kd.find("test-full.accuracy") == kd.find("test.accuracy") == results[1][0]
    assert kd.find("test-center_crop.accuracy") == results[0][0]


def test_points_are_selected_in_the_frame_that_is_evaluated(frozen):
    base = sweep_arguments(
        frozen, "variants={kd: []}", "grid={method.tau: [1, 5]}", "subset.holdout=1",
        "select=holdout.accuracy", "evaluate.splits=[test]",
    )  # fmt: skip
    run_sweep(base)

    result = run_sweep([*base, "evaluate.frame=center_crop"])

    assert (result.trained_now, shown_folders()) == (0, {"evaluate-on-test-center_crop"})
    (chosen,) = read_sweep()["runs"]
    selections = sorted(path.name for path in (RUNS / chosen["run"] / "select").iterdir())
    assert selections == ["holdout", "holdout-on-holdout-center_crop"]


def test_only_options_of_the_training_name_a_student(frozen):
    def names(*more, run="grid"):
        base = sweep_arguments(frozen, TWO_VARIANTS, *more, run=run)
        return [s.name.rpartition("/")[2] for s in plan_students(sweep_config(base), base)]

    same = names()
    for evaluation in (
        ["evaluate.frame=full", "evaluate.splits=[train]", "evaluate.region=masks"],
        ["evaluators=[accuracy]", "evaluate.against=resnet8"],
        [f"evaluate.store={frozen.store.path}"],
    ):
        assert names(*evaluation) == same
    assert names(run="other") == same
    assert not set(names("trainer.epochs=2")) & set(same)


def test_other_options_of_an_evaluation_are_refused_before_anything_is_computed(frozen):
    base = sweep_arguments(frozen, TWO_VARIANTS, "evaluate.splits=[test]")
    run_sweep(base)
    before = evaluation_files()

    with pytest.raises(
        ConfigError, match=r"contains a run with .*: evaluate\.iou_threshold 0\.05 -> 0\.5"
    ):
        run_sweep([*base, "evaluate.iou_threshold=0.5"])

    assert evaluation_files() == before


def test_evaluations_on_two_stores_lie_beside_each_other(frozen, tmp_path):
    data = replace(TINY_DATA, test_placements=2)
    precompute.run(precompute_config(tmp_path / "other", frozen.config.teacher, data=data))
    base = sweep_arguments(frozen, "variants={kd: []}", "evaluate.splits=[test]")
    other = [*base, f"evaluate.store={tmp_path / 'other'}"]

    results, folders, records = [], [], []
    for words in (other, base, other, [*base, "evaluate.against=resnet8"]):
        results.append(run_sweep(words))
        folders += sorted(shown_folders())
        (result,) = load_results("grid")
        records.append(next(iter(result.numbers.values()))["records"])

    assert [(r.trained_now, r.finished_now) for r in results] == [(1, 1), (0, 1), (0, 0), (0, 1)]
    assert (folders[0], folders[2], folders[3]) == (
        "evaluate",
        "evaluate",
        "evaluate-against-resnet8",
    )
    assert folders[1].startswith("evaluate-in-store-")
    assert records == [20, 10, 20, 10]
    sources = {source.partition("@")[2] for source in result.sources}
    assert sources == {"", "resnet8"}


def start_sweep(base, folder):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "stages.sweep", *base, "executor=ray"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def logged_steps(folder):
    """Number of lines that a training has logged."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def students_of(driver):
    return [p for p in descendants(driver.pid) if title(p).startswith("ray::grid/students/")]


@pytest.mark.ray
@pytest.mark.slow
def test_a_student_ends_as_if_nothing_had_happened_whoever_is_killed(frozen, tmp_path):
    base = sweep_arguments(
        frozen, "variants={e2kd: []}", "trainer.epochs=40", "trainer.log_every_steps=1"
    )
    run_sweep(base)
    expected = RUNS / read_sweep()["runs"][0]["run"] / "distill"
    folder = tmp_path / "disturbed" / expected

    driver = start_sweep(base, tmp_path / "disturbed")
    wait_until(lambda: logged_steps(folder) > 10, driver)
    (student,) = students_of(driver)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate()
    assert (driver.returncode, "Traceback" in errors) == (143, False), errors
    wait_until(lambda: not title(student))
    steps = logged_steps(folder)
    assert not (folder / "model.json").exists()  # the training was not finished

    driver = start_sweep(base, tmp_path / "disturbed")
    wait_until(lambda: logged_steps(folder) > steps + 10, driver)
    (student,) = students_of(driver)
    os.kill(student, signal.SIGSTOP)
    wait_until(lambda: status(student) == "T")
    assert not (folder / "model.json").exists()
    os.kill(student, signal.SIGKILL)
    output, errors = driver.communicate()

    assert driver.returncode == 0, errors
    assert "finished_now: 1" in output
    for name in ("model.safetensors", "model.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


def test_a_deleted_student_is_trained_again_and_an_older_table_is_written_anew(frozen):
    base = sweep_arguments(frozen, TWO_VARIANTS, "evaluate.splits=[test]")
    run_sweep(base)
    rows = read_sweep()["runs"]
    shutil.rmtree(RUNS / rows[0]["run"])
    write_json(RUNS / "grid/sweep.json", {"runs": [{**row, "run": "gone"} for row in rows]})

    again = run_sweep(base)

    assert again.trained_now == 1
    assert read_sweep()["runs"] == rows
