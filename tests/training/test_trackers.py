"""Trackers of trainings: what TensorBoard reads, a tracker that cannot write, and a resumed training in any tracker."""

import errno
import gc
import itertools
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from permafrost.core.errors import ConfigError
from permafrost.evaluation.evaluate import evaluate_student
from permafrost.runs import trackers
from permafrost.runs.mirrors import RUNS
from permafrost.runs.trackers import TrackedRun, Tracker, check_logger
from permafrost.storage.local_files import NoSpaceError
from permafrost.sweeps.plan import plan_students
from permafrost.training.distill import distill_student
from permafrost.training.metric_log import MetricWriter, read_metrics
from tests.support.composition import config_of
from tests.support.run_files import tracked_run, write_lines
from tests.support.runs import TRAINER, distill_config, evaluate_config
from tests.support.verbs import teach

LINES = [{"total": 1.5, "lr": 0.1, "step": 4, "epoch": 0}, {"total": 0.5, "step": 8, "epoch": 1}]
OTHERS = ["wandb", "mlflow", "trackio"]


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


# ---- TensorBoard -----------------------------------------------------------------------------------


def test_tensorboard_reads_the_numbers_of_each_line_at_its_step(tmp_path):
    write_lines(tmp_path, LINES)
    assert scalars(tmp_path / "tensorboard") == {"total": [(4, 1.5), (8, 0.5)], "lr": [(4, 0.1)]}


def test_events_of_a_killed_run_are_replaced_from_the_step_at_which_it_goes_on(
    tmp_path, monkeypatch
):
    clock = itertools.count(1_700_000_000)  # TensorBoard reads files in the order of their seconds
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for first_step, line in ((1, LINES[0]), (5, LINES[1]), (5, {"total": 9.0, "step": 8})):
        tracker = Tracker(tracked_run(tmp_path), first_step)
        tracker.add(line)
        tracker.close()
    tracked_run(tmp_path).add_results("evaluate", {"test": {"accuracy": 0.75}})

    shown = scalars(tmp_path / "tensorboard")
    assert shown["total"] == [(4, 1.5), (8, 9.0)]
    assert shown["evaluate/test.accuracy"] == [(0, 0.75)]


def test_a_student_and_its_evaluation_are_one_run(frozen):
    distill_student(distill_config(frozen))
    result = evaluate_student(evaluate_config(frozen))
    evaluate_student(evaluate_config(frozen))  # there is nothing left to evaluate

    shown = scalars(RUNS / "one/distill/tensorboard")
    lines = list(read_metrics(RUNS / "one/distill"))
    assert shown["total"] == [(line["step"], pytest.approx(line["total"])) for line in lines]
    for split in ("test", "test_swapped"):
        accuracy = pytest.approx(result.splits[split]["accuracy"])
        assert shown[f"evaluate/{split}.accuracy"] == [(0, accuracy)]
    assert not (RUNS / "one/evaluate/tensorboard").exists()


# ---- trackers that cannot write --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_training_goes_on_without_events_where_they_have_no_room(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    trackers._leave_to_the_client.cache_clear()
    with caplog.at_level(logging.WARNING, "permafrost"):
        write_lines(tmp_path, LINES)
    assert printed == []
    other = threading.Thread(target=full)
    other.start()
    other.join()
    assert [failed.thread for failed in printed] == [other]
    (warning,) = caplog.messages
    assert f"logger=tensorboard cannot write the run in {tmp_path}/tensorboard" in warning
    assert os.strerror(errno.ENOSPC) in warning
    assert list(read_metrics(tmp_path)) == LINES
    gc.collect()  # of TensorBoard's own file


def test_a_folder_that_cannot_be_created_is_one_warning_too(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    with caplog.at_level(logging.WARNING, "permafrost"):
        write_lines(tmp_path, LINES)
    assert len(caplog.messages) == 1


def test_metrics_that_have_no_room_name_their_file(tmp_path, monkeypatch):
    opened = Path.open

    def open_full(path, *words, **options):
        is_full = path.name.startswith("metrics.")
        return opened(Path("/dev/full") if is_full else path, *words, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with (
        MetricWriter(tracked_run(tmp_path), 0) as writer,
        pytest.raises(NoSpaceError, match=r"no room to write .*metrics\.jsonl"),
    ):
        writer.write(LINES[0])


class Recorder(trackers.TrackerClient):
    """Client that keeps what it is given, and fails in the methods of `failing`."""

    calls = []
    failing = ()

    def __init__(self, tracked, first_step, last_step):
        self.last_step = last_step
        self._keep("begin", tracked.name, first_step)

    def log(self, numbers, step):
        print("the terminal of a tracker")
        self._keep("log", dict(numbers), step)

    def close(self, is_finished):
        self._keep("close", is_finished)

    def _keep(self, method, *values):
        self.calls.append((method, *values))
        if method in self.failing:
            raise LookupError("no network\nand more lines")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(trackers, "resolve_name", lambda _: Recorder)
    return Recorder


@pytest.mark.parametrize("method", ["begin", "log", "close"])
def test_any_error_of_a_tracker_is_one_warning_and_the_student_is_the_same(
    frozen, recorder, monkeypatch, caplog, capsys, method
):
    monkeypatch.setattr(recorder, "failing", (method,))
    trainer = replace(TRAINER, epochs=1)
    with caplog.at_level(logging.WARNING, "permafrost.trackers"):
        distill_student(distill_config(frozen, trainer=trainer))
    (warning,) = caplog.messages
    assert warning.endswith("(LookupError: no network); the work continues without it")
    lines = list(read_metrics(RUNS / "one/distill"))
    assert [name for name, *_ in recorder.calls].count("log") == {
        "begin": 0,
        "log": 1,
        "close": len(lines),
    }[method]
    assert len(lines) > 1
    assert "terminal" not in capsys.readouterr().out


# ---- any tracker -----------------------------------------------------------------------------------


def test_a_resumed_training_adds_no_step_twice(tmp_path, recorder):
    """It was killed after step 8, and its checkpoint is of step 4."""
    folder = tmp_path / "distill"
    folder.mkdir()
    write_lines(folder, LINES)
    recorder.calls.clear()
    with MetricWriter(tracked_run(folder), 4) as writer:
        for step in (8, 12):
            writer.write({"total": 0.5, "lr": 0.1, "step": step, "epoch": 1})

    assert recorder.calls == [
        ("begin", "demo/students/kd-seed0", 5),
        ("log", {"total": 0.5, "lr": 0.1}, 12),
        ("close", True),
    ]
    assert [line["step"] for line in read_metrics(folder)] == [4, 8, 12]


def test_a_training_that_fails_is_not_shown_as_finished(tmp_path, recorder):
    with pytest.raises(KeyboardInterrupt), MetricWriter(tracked_run(tmp_path), 0):
        raise KeyboardInterrupt
    assert recorder.calls[-1] == ("close", False)


@pytest.mark.parametrize(
    ("run", "verb", "project", "name"),
    [
        ("one", "distill", "one", "one"),
        ("one", "teach", "one", "one/teach"),
        ("one/two/", "distill", "one", "one/two/"),
        ("demo/students/kd-seed0-1f", "distill", "demo", "demo/students/kd-seed0-1f"),
        ("/data/demo/students/kd", "distill", "demo", "/data/demo/students/kd"),
        ("s3://runs/a/demo", "distill", "demo", "s3://runs/a/demo"),
    ],
)
def test_a_run_has_its_name_in_a_project_of_its_first_part(run, verb, project, name):
    tracked = TrackedRun("wandb", run, Path("/runs/x") / verb)
    assert (tracked.project, tracked.name) == (project, name)


def test_the_name_of_a_run_in_a_tracker_is_kept_and_checked(tmp_path):
    tracked = tracked_run(tmp_path, "wandb")
    assert tracked.read_state() == (None, 0)
    tracked.save_state("1f", 8)
    assert tracked.read_state() == ("1f", 8)
    assert tracked.read_state(last_step=11) == ("1f", 11)
    (tmp_path / "wandb/run.json").write_text('{"id": "2f", "last_step": 8}\n')
    with pytest.raises(ValueError, match="the tracker begins another run"):
        tracked.read_state()


# ---- packages that are not installed ---------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
def test_a_missing_package_is_an_error_before_anything_is_computed(frozen, monkeypatch, kind):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    words = [f"store.path={frozen.store.path}", "run=one", f"logger={kind}"]
    teacher = config_of("teach", *words)
    sweep = [*words, "variants={kd: [method=kd]}"]
    works = [
        lambda: distill_student(distill_config(frozen, logger=kind)),
        lambda: evaluate_student(replace(evaluate_config(frozen), logger=kind)),
        lambda: teach.run(teacher),
        lambda: plan_students(config_of("sweep", *sweep), sweep),
    ]
    for work in works:
        with pytest.raises(ConfigError) as raised:
            work()
        assert str(raised.value) == (
            f"logger={kind} needs the package {kind}, which is not installed; "
            f"run pip install {kind}"
        )
    assert not (RUNS / "one").exists()


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "tracker_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.TRACKERS, "tracker_folder", "tracker_folder:Client")
    with pytest.raises(ConfigError, match="not installed"):
        check_logger("tracker_folder")
    check_logger("tensorboard")


def test_another_logger_is_no_option(frozen):
    with pytest.raises(
        ConfigError, match=r"logger=clearml is not .* of tensorboard, wandb, mlflow, t"
    ):
        distill_student(distill_config(frozen, logger="clearml"))
