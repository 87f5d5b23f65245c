"""Runs of wandb, MLflow and Trackio, read back by each library itself (make test-loggers); skipped without them."""

import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.runs.mirrors import RUNS
from permafrost.runs.trackers import TrackedRun, Tracker
from permafrost.training.distill import distill_student
from permafrost.training.metric_log import read_metrics
from tests.support.run_files import read_signed
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.sweeps import TWO_VARIANTS, read_sweep, run_sweep, sweep_arguments
from tests.support.verbs import teach

KINDS = ["wandb", "mlflow", "trackio"]
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, KINDS)), reason="not all trackers are installed; run make test-loggers"
)
UNREACHABLE = "http://127.0.0.1:9"
"""Address at which nothing listens."""


@pytest.fixture(scope="module", autouse=True)
def trackio_folder(tmp_path_factory):
    """Folder of Trackio, which reads its environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trackio")
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


# ---- readers ---------------------------------------------------------------------------------------


@dataclass
class Shown:
    """Run as its tracker shows it."""

    project: str
    name: str
    curves: dict[str, list[tuple[int, float]]]
    """Steps and values of each metric, in the order in which they were written."""
    results: dict[str, float]
    is_finished: bool
    options: dict[str, object]


def records_of(path):
    """Records of a file of wandb, read by its own inspector."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def read_wandb(folder):
    runs = {}
    for path in sorted(folder.rglob("*.wandb")):
        records = records_of(path)
        (about,) = (record["run"] for record in records if record["type"] == "run")
        run = runs.setdefault(
            about["run_id"],
            Shown(about["project"], about["display_name"], defaultdict(list), {}, False, {}),
        )
        run.options |= about["config"]["update"]
        for record in records:
            content = record[record["type"]]
            if record["type"] == "history":
                for name, value in content["item"].items():
                    run.curves[name].append((content["step"]["num"], value))
            elif record["type"] == "summary":
                update = content["update"].items()
                run.results |= {name: value for name, value in update if "/" in name}
            elif record["type"] == "exit":
                run.is_finished = content.get("exit_code", 0) == 0
    return list(runs.values())


def read_mlflow(folder):
    from mlflow import MlflowClient

    local = f"sqlite:///{(folder / 'mlflow').absolute()}/mlflow.db"
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
    shown = []
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            run_id = run.info.run_id
            points = {
                name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
                for name in run.data.metrics
            }
            is_finished = run.info.status == "FINISHED"
            about = (experiment.name, run.info.run_name, run.data.params)
            shown.append(shown_of(*about, points, is_finished))
    return shown


def read_trackio(folder):
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    shown = []
    for project in SQLiteStorage.get_projects():
        for run in Api().runs(project):
            points = defaultdict(list)
            for line in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
                for name, value in line.items():
                    points[name].append((line["step"], value))
            options = SQLiteStorage.get_run_config(project, run.name, run_id=run.id)
            shown.append(shown_of(project, run.name, options, points))  # it knows no end of a run
    return shown


def shown_of(project, name, options, points, is_finished=True):
    curves = {metric: values for metric, values in points.items() if "/" not in metric}
    results = {}
    for metric in points.keys() - curves.keys():
        ((_, results[metric]),) = points[metric]
    return Shown(project, name, curves, results, is_finished, options)


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}


def expected_curve(folder, metric):
    return [(line["step"], pytest.approx(line[metric])) for line in read_metrics(folder)]


def expected_results(folder, metric="accuracy", evaluation="evaluate"):
    splits = read_signed(folder / "metrics.json")["splits"]
    return {f"{evaluation}/{s}.{metric}": pytest.approx(splits[s][metric]) for s in splits}


# ---- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_student_and_its_evaluation_are_one_run_without_doubled_steps(frozen, kind):
    """It is interrupted in its third epoch, and goes on after its second."""
    trainer = replace(TRAINER, checkpoint_every_epochs=2)
    name = f"{kind}/one"
    folder = RUNS / name / "distill"

    def stop(epoch, line):
        if epoch == 3:
            raise KeyboardInterrupt

    longer = distill_config(frozen, run=name, trainer=replace(trainer, epochs=4), logger=kind)
    with pytest.raises(KeyboardInterrupt):
        distill_student(longer, stop)
    written = list(read_metrics(folder))
    distill_student(longer)
    evaluate_student(replace(evaluate_config(frozen, run=name), logger=kind))

    (shown,) = [run for run in READERS[kind](folder) if run.name == name]
    assert written[-1]["step"] > len(written) // 3 * 2  # beyond the checkpoint
    assert shown.project == kind
    assert shown.curves["total"] == expected_curve(folder, "total")
    assert shown.curves["lr"] == expected_curve(folder, "lr")
    assert len(shown.curves["total"]) > len(written)
    assert str(shown.options["method.kind"]) == "e2kd"
    assert float(shown.options["trainer.epochs"]) == 4
    assert expected_results(RUNS / name / "evaluate").items() <= shown.results.items()
    assert shown.is_finished


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_is_killed_twice_adds_no_step_twice(kind, tmp_path, monkeypatch):
    """The second call is killed before it comes as far as the first one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/all.db")
    tracked = TrackedRun(kind, f"twice-{kind}", tmp_path / "distill")
    for first_step, last_step, steps in ((1, 0, (4, 8)), (5, 8, ()), (5, 4, (8, 12))):
        tracker = Tracker(tracked, first_step, last_step)
        for step in steps:
            tracker.add({"total": 1.0 / step, "step": step, "epoch": 0})
        tracker.close(is_finished=step == 12)

    (shown,) = [r for r in READERS[kind](tracked.folder) if r.project == f"twice-{kind}"]
    assert shown.curves["total"] == [(step, pytest.approx(1.0 / step)) for step in (4, 8, 12)]
    assert shown.is_finished


@pytest.mark.parametrize("kind", KINDS)
def test_each_student_of_a_sweep_is_a_run_in_the_project_of_the_sweep(
    frozen, kind, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/all.db")
    run = f"sweep-{kind}"
    run_sweep(sweep_arguments(frozen, f"run={run}", f"logger={kind}", TWO_VARIANTS))
    names = {row["run"] for row in read_sweep(run)["runs"]}

    shown = {r.name: r for r in READERS[kind](RUNS / run) if r.project == run}
    assert shown.keys() == names
    for name, student in shown.items():
        assert student.curves["total"] == expected_curve(RUNS / name / "distill", "total")
        assert expected_results(RUNS / name / "evaluate").items() <= student.results.items()
    assert len(names) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_a_run_with_its_results(frozen, kind):
    words = [
        *(f"store.path={frozen.store.path}", f"run=school-{kind}", f"logger={kind}"),
        *("teacher=cifar", "teacher.name=resnet8", "teaching.trainer.epochs=1"),
        *("teaching.trainer.batch_size=8", "teaching.trainer.log_every_steps=2"),
    ]
    teach.run(build_verb_config("teach", compose("teach", words)))
    folder = RUNS / f"school-{kind}" / "teach"

    (shown,) = [run for run in READERS[kind](folder) if run.project == f"school-{kind}"]
    assert shown.name == f"school-{kind}/teach"
    assert shown.curves["total"] == expected_curve(folder, "total")
    assert expected_results(folder).items() <= shown.results.items()


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_training_goes_on_where_the_server_is_not_reached(frozen, kind, monkeypatch, caplog):
    if kind == "wandb":
        import wandb

        wandb.teardown()  # which has read its environment
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", UNREACHABLE)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", UNREACHABLE)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "permafrost.trackers"):
        distill_student(distill_config(frozen, run="offline", logger=kind))

    (warning,) = [r.message for r in caplog.records if r.name == "permafrost.trackers"]
    assert warning.startswith(f"logger={kind} cannot write the run in ")
    assert (RUNS / "offline/distill/model.json").exists()
    assert list(read_metrics(RUNS / "offline/distill"))
