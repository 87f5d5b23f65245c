"""Shards as rows of Ray Data and their gate: which one is blamed for a death, and actors that hang are ended."""

import asyncio
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from permafrost.cluster import placement, shard_rows
from permafrost.cluster.placement import ClusterError
from permafrost.cluster.ray_executor import RayExecutor
from permafrost.cluster.shard_rows import Gate
from permafrost.config.cluster import LocalClusterConfig
from permafrost.core.interrupts import check_interrupted
from permafrost.core.tasks import ShardResult, Subject
from permafrost.sweeps.student_task import StudentTask

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class StopOnce:
    """Task whose process stops itself at shard 3, before or within its work, once."""

    file: Path
    needs_gpu = False
    subject = Subject("", "work")

    def __call__(self, shard):
        check_interrupted()
        if shard == 3 and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)
        return ShardResult(name=str(shard), records=os.getpid(), seconds=0.0, report=None)


def test_an_actor_that_is_stopped_is_ended_and_its_shards_are_given_to_another_one(
    tmp_path, caplog
):
    config = LocalClusterConfig(actors=2, cpus_per_actor=0.5)
    executor = RayExecutor(config)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        results = list(executor.map_shards(StopOnce(tmp_path / "stopped"), range(12)))
    seconds = time.monotonic() - started
    executor.close()

    assert sorted(int(result.name) for result in results) == list(range(12))
    assert shard_rows._SILENT_SECONDS < seconds < shard_rows._SILENT_SECONDS + 60
    (line,) = [m for m in caplog.messages if "has not gone on for 3" in m]
    assert "(shard 3); it is ended, and another one gets its shard" in line
    assert os.uname().nodename in line


def test_a_request_that_no_node_can_hold_ends_soon(caplog, request):
    executor = RayExecutor(LocalClusterConfig(gpus_per_actor=1))
    request.addfinalizer(executor.close)
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ClusterError, match=r"hold one actor, which needs 1 CPU, 1 GPU; .* 0 GPU"),
    ):
        list(executor.map_shards(NeedsGpu(), range(3)))
    assert time.monotonic() - started < placement._JOIN_SECONDS + 60
    assert "waiting 15 s for a node to join" in caplog.text


def hold():
    time.sleep(600)


@pytest.mark.parametrize(
    ("work", "process"),
    [
        (lambda executor: executor.map_shards(StopOnce(Path("never")), range(3)), "actors: 0 of 2"),
        (
            lambda executor: executor.run_tasks(
                [StudentTask(SimpleNamespace(name="s", baselines=()))], print
            ),
            "students: 0 of 1",
        ),
    ],
)
def test_a_wait_for_room_is_said_again_and_bounded(work, process, caplog, capfd, request):
    config = LocalClusterConfig(actors=2, cpus_per_actor=4, cpus_per_student=4, max_wait_seconds=25)
    executor = RayExecutor(config)
    request.addfinalizer(executor.close)
    executor._start(8)
    import ray

    busy = ray.remote(hold).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ClusterError, match=r"cluster\.max_wait_seconds=25 went by without room"),
    ):
        list(work(executor))
    ray.cancel(busy, force=True)

    lines = [m for m in caplog.messages if f"{process} started; each needs 4 CPU" in m]
    assert len(lines) >= 2
    assert "cluster.max_wait_seconds leaves" in lines[0]
    assert "Traceback" not in capfd.readouterr().err


class NeedsGpu:
    """Task of a teacher."""

    needs_gpu = True
    subject = Subject("", "work")

    def __call__(self, shard):
        raise AssertionError


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "host", "Alive": True}])
    return Gate(most_deaths=5, actors=2)


async def begun(gate, row, actor):
    """Give a row its shard, which the actor begins."""
    assignment = await gate.take(row, actor)
    await gate.begin(assignment.number, f"shard-{assignment.number}", actor, "host")
    return assignment


def test_of_two_shards_of_a_dead_process_none_is_blamed_and_each_is_done_alone(gate):
    async def play():
        await gate.add(1, b"", [b"", b"", b""])
        for row, actor in enumerate("abb"):
            await begun(gate, row, actor)
        both = [await begun(gate, row, actor) for row, actor in ((1, "b"), (2, "a"))]
        again = [await begun(gate, row, "b") for row in (1, 1)]
        return both, again, await begun(gate, 0, "a")

    both, again, other = asyncio.run(play())

    assert [(each.deaths, each.is_alone) for each in both] == [(0, True)] * 2
    assert [(each.deaths, each.is_alone) for each in again] == [(1, True), (2, True)]
    assert (other.deaths, other.is_alone) == (0, True)  # its actor had been given another one, too


def test_a_pass_whose_actors_are_between_shards_without_end_names_what_is_left(gate, monkeypatch):
    monkeypatch.setattr(shard_rows, "_UNIT_SECONDS", 3)

    async def play(shard, is_writing=False):
        await gate.add(1, b"", [b"", b""])
        await begun(gate, 0, "a")
        ends = []
        for _ in range(5):
            await gate.report("a", [], "host", shard, 1, is_writing)
            ends.append((await gate.take_silent())[3])
        return ends

    assert asyncio.run(play("shard-0")) == [[]] * 5
    assert asyncio.run(play("", is_writing=True)) == [[]] * 5  # a large upload may take longer
    names = ["shard-0", *(f"number {number}" for number in range(1, 6))]
    assert asyncio.run(play("")) == [[]] * 3 + [names] * 2
