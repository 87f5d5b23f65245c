"""Runs on Ray, whose results equal those of serial runs. All tests share one session, in which nothing is killed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray

from permafrost.cluster.ray_executor import RayExecutor
from permafrost.config.cluster import LocalClusterConfig
from permafrost.core.tasks import ShardError, ShardResult, Subject
from permafrost.models.saved import SavedNetwork
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from tests.support.images import write_tar
from tests.support.runs import TWO_RANKS, TWO_RANKS_CLUSTER, distill_config, logged_lines
from tests.support.stores import precompute_config
from tests.support.sweeps import read_sweep, run_sweep, sweep_arguments
from tests.support.tars import samples, tar_config
from tests.support.trees import tree_bytes
from tests.support.verbs import distill, precompute, sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.parametrize("actors", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ray_and_serial_write_the_same_bytes(tmp_path, frozen, actors):
    config = precompute_config(
        tmp_path / "store",
        frozen.config.teacher,
        executor="ray",
        cluster=LocalClusterConfig(actors=actors, cpus_per_actor=0.5),
    )

    result = precompute.run(config)

    assert (result.packed_records, result.teacher_records) == (72, 72)
    assert tree_bytes(tmp_path / "store") == tree_bytes(frozen.store.path)


@pytest.mark.slow
def test_tars_listed_on_ray_make_the_same_store(tmp_path):
    for number, count in enumerate((5, 9, 7)):
        members = samples(count, first=100 * number)
        write_tar(tmp_path / f"tars/train-{number:06d}.tar", members)
    data = tar_config(tmp_path / "tars", reference="never")
    for executor in ("serial", "ray"):
        precompute.run(
            precompute_config(
                tmp_path / executor,
                data=data,
                executor=executor,
                cluster=LocalClusterConfig(cpus_per_actor=0.5),
            )
        )

    assert tree_bytes(tmp_path / "ray") == tree_bytes(tmp_path / "serial")
    assert len(Store(tmp_path / "ray").manifest.shards) == 2


@dataclass
class FailOnOdd:
    """Task that fails on odd shards, by an exception or by ending its process."""

    needs_gpu = False
    subject = Subject("", "work")

    def __call__(self, shard):
        if shard == 1:
            raise ValueError(f"shard {shard} is odd")
        if shard == 3:
            raise SystemExit(1)
        return ShardResult(name=str(shard), records=shard, seconds=0.0, report=None)


@pytest.mark.slow
def test_a_failing_shard_lets_the_others_finish_and_is_reported():
    executor = RayExecutor(LocalClusterConfig(cpus_per_actor=0.5))
    results = executor.map_shards(FailOnOdd(), range(5))

    finished = [next(results).name for _ in range(3)]

    assert sorted(finished) == ["0", "2", "4"]
    with pytest.raises(ShardError, match="2 of 5 shards failed"):
        next(results)
    executor.close()


@dataclass
class Count:
    """Task that succeeds."""

    needs_gpu = False
    subject = Subject("", "work")

    def __call__(self, shard):
        return ShardResult(name=str(shard), records=shard, seconds=0.0, report=None)


@pytest.mark.slow
def test_no_shard_waits_for_an_actor_without_room():
    """One of two actors takes all CPUs, and the other one is never started."""
    config = LocalClusterConfig(actors=2, cpus_per_actor=ray.cluster_resources()["CPU"])

    executor = RayExecutor(config)

    results = list(executor.map_shards(Count(), range(5)))
    executor.close()

    assert sorted(result.name for result in results) == ["0", "1", "2", "3", "4"]


def student_bytes(run):
    return {
        row["variant"]: (RUNS / row["run"] / "distill" / "model.safetensors").read_bytes()
        for row in read_sweep(run)["runs"]
    }


@pytest.mark.slow
def test_ray_trains_the_same_students_and_finishes_those_that_do_not_fail(frozen, monkeypatch):
    bad = "['method=kd', trainer.warmup_epochs=0, trainer.warmup_steps=4096]"
    variants = f"variants={{kd: ['method=kd'], bad: {bad}, e2kd: []}}"
    messages = []
    for executor in ("serial", "ray"):
        base = sweep_arguments(
            frozen, variants, f"executor={executor}", "cluster.cpus_per_student=0.5", run=executor
        )
        with pytest.raises(sweep.SweepError) as error:
            run_sweep(base)
        messages.append(str(error.value).replace(f"/{executor}/", "//").partition("|")[0])
        assert "1 of 3 students failed" in messages[-1]

    assert set(student_bytes("ray")) == {"kd", "e2kd"}
    assert student_bytes("ray") == student_bytes("serial")
    assert messages[0].partition("warmup")[2] == messages[1].partition("warmup")[2] != ""


@pytest.mark.slow
def test_two_ranks_train_a_student_and_leave_a_finished_run(frozen, monkeypatch):
    config = distill_config(frozen, run="both", trainer=TWO_RANKS, cluster=TWO_RANKS_CLUSTER)

    result = distill.run(config)

    assert result.trained_epochs == 3
    assert [line["step"] for line in logged_lines("both")] == [2, 3, 5, 6, 8, 9, 10, 12, 14, 15]
    assert SavedNetwork(RUNS / "both" / "distill").load()[1].teachers == (
        frozen.store.pass_folders()[0].name,
    )
    # A finished run is detected without starting a rank.
    monkeypatch.setattr(
        "permafrost.cluster.ray_training.ray_session",
        lambda *_: pytest.fail("a session was opened"),
    )
    assert distill.run(config).trained_epochs == 0
    assert distill.run(replace(config, trainer=replace(TWO_RANKS, ranks=1))).trained_epochs == 0


@dataclass
class Turn:
    """Task that fails unless the tasks before it have ended, and that leaves a file when it ends."""

    name: str
    folder: Path
    after: tuple[str, ...] = ()

    def __call__(self, report):
        assert all((self.folder / name).exists() for name in self.after), f"{self.name} was early"
        time.sleep(0.3)
        (self.folder / self.name).touch()


@pytest.mark.slow
def test_a_task_waits_for_those_it_names(tmp_path):
    tasks = [
        Turn("a", tmp_path),
        Turn("b", tmp_path, after=("a",)),
        Turn("c", tmp_path),
        Turn("d", tmp_path, after=("b", "c")),
    ]

    executor = RayExecutor(LocalClusterConfig(cpus_per_student=0.5))
    outcomes = list(executor.run_tasks(tasks, print, at_once=2))

    assert {outcome.name: outcome.error for outcome in outcomes} == dict.fromkeys("abcd", "")


@pytest.mark.slow
def test_tasks_that_wait_for_each_other_all_run(tmp_path):
    tasks = [Turn("a", tmp_path, after=("b",)), Turn("b", tmp_path, after=("a",))]

    executor = RayExecutor(LocalClusterConfig(cpus_per_student=0.5))
    outcomes = list(executor.run_tasks(tasks, print, at_once=2))

    assert "a was early" in outcomes[0].error
    assert outcomes[1].name == "b"


@dataclass
class Alone:
    """Task that reports often, and fails if another one runs at the same time."""

    name: str
    folder: Path
    after: tuple[str, ...] = ()

    def __call__(self, report):
        running = self.folder / self.name
        running.touch()
        for number in range(30):
            report(f"line {number}")
            time.sleep(0.1)
            assert list(self.folder.iterdir()) == [running]
        running.unlink()


@pytest.mark.slow
def test_a_task_that_reports_keeps_its_cpus(tmp_path):
    """Ray gives the CPUs of a task that waits for another process to the next task."""
    tasks = [Alone("a", tmp_path), Alone("b", tmp_path), Alone("c", tmp_path)]
    lines = []

    executor = RayExecutor(LocalClusterConfig(cpus_per_student=ray.cluster_resources()["CPU"]))
    outcomes = list(executor.run_tasks(tasks, lambda name, line: lines.append(line)))

    assert {outcome.name: outcome.error for outcome in outcomes} == dict.fromkeys("abc", "")
    assert len(lines) > 0
