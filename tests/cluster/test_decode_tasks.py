"""Decoding by tasks of Ray: where it happens, what it costs in memory, and what happens without room or an answer."""

import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import ray

from permafrost.cluster import decode_tasks
from permafrost.cluster.decode_tasks import DecodeTasks
from permafrost.config.cluster import LocalClusterConfig
from permafrost.core.tasks import ShardResult


@pytest.fixture
def said():
    return []


def choices(said, waits, **options):
    """Return who decodes after each of the shards that waited for so many seconds."""
    tasks = DecodeTasks(LocalClusterConfig(**options), said.append)
    used = []
    for waited in waits:
        waits_of_shard = {"decode": waited}
        result = ShardResult(name="s", records=10, seconds=1.0, waits=waits_of_shard, report=None)
        tasks.choose(result)
        used.append(tasks.is_used)
    return used


@pytest.mark.parametrize(
    ("decode", "waits", "used", "lines"),
    [
        ("actors", [0.9] * 6, [False] * 6, 0),
        ("hosts", [0.9] * 6, [True] * 6, 0),
        ("auto", [0.9, *[0.09] * 5], [False] * 6, 0),  # nothing was decoded before the first shard
        # The two after a change: one that was begun before, and one for which processes were started.
        (
            "auto",
            [0.9, *[0.5] * 3, 0.9, 0.9, *[0.3] * 4, 3.0],
            [*[False] * 3, *[True] * 7, False],
            2,
        ),
        ("auto", [0.9, *[0.5] * 3, 0.1, 0.1, *[0.6] * 3], [*[False] * 3, *[True] * 5, False], 2),
    ],
)
def test_hosts_decode_if_the_teacher_waits_less_for_them(
    monkeypatch, said, decode, waits, used, lines
):
    monkeypatch.setattr(decode_tasks, "_has_room_elsewhere", lambda: True)

    assert choices(said, waits, decode=decode) == used
    assert len(said) == lines


def test_hosts_are_not_tried_where_there_are_none(monkeypatch, said):
    monkeypatch.setattr(decode_tasks, "_has_room_elsewhere", lambda: False)

    assert choices(said, [0.9] * 6) == [False] * 6
    assert said == []


def values(path, number):
    """Return an array of 4 MB, and note the process."""
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return np.full(2**20, number, np.float32)


def die_elsewhere(path, pid):
    if os.getpid() != pid:
        os.kill(os.getpid(), signal.SIGKILL)
    return values(path, 1)


def fail_elsewhere(path, pid):
    if os.getpid() != pid:
        raise ValueError("this host has no such folder")
    return values(path, 1)


@pytest.fixture(scope="module")
def one_core():
    """A Ray of one core."""
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="fatal"
    )
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_call_is_made_in_another_process_and_leaves_nothing_in_the_object_store(
    one_core, said, tmp_path
):
    tasks = DecodeTasks(LocalClusterConfig(decode="hosts"), said.append)
    path = tmp_path / "pids"
    calls = [tasks.begin(partial(values, path, number)) for number in range(3)]

    assert [float(call()[-1]) for call in calls] == [0, 1, 2]
    assert str(os.getpid()) not in path.read_text().split()
    assert tasks.take_batches() == {os.uname().nodename: 3}
    assert tasks.take_batches() == {}
    assert said == []
    del calls
    deadline = time.monotonic() + 60
    while (
        ray.available_resources()["object_store_memory"]
        < ray.cluster_resources()["object_store_memory"]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "reason"),
    [(die_elsewhere, "died unexpectedly"), (fail_elsewhere, "this host has no such folder")],
)
def test_what_no_process_can_do_is_done_here_and_said_once(one_core, said, tmp_path, call, reason):
    tasks = DecodeTasks(LocalClusterConfig(decode="hosts"), said.append)
    path = tmp_path / "pids"
    begun = [tasks.begin(partial(call, path, os.getpid())) for _ in range(3)]

    assert [float(finish()[0]) for finish in begun] == [1, 1, 1]
    assert path.read_text().split() == [str(os.getpid())] * 3
    (line,) = said
    assert line.startswith("images are decoded in the teacher's actor for the next 60 s, as ")
    assert reason in line


@pytest.mark.ray
@pytest.mark.slow
def test_without_a_free_core_calls_are_made_here_after_ten_seconds(one_core, said, tmp_path):
    @ray.remote(num_cpus=1)
    class Actor:
        def ready(self):
            return True

    actor = Actor.remote()
    assert ray.get(actor.ready.remote())
    tasks = DecodeTasks(LocalClusterConfig(decode="hosts"), said.append)
    path = tmp_path / "pids"
    started = time.monotonic()
    begun = [tasks.begin(partial(values, path, number)) for number in range(3)]

    assert [float(finish()[0]) for finish in begun] == [0, 1, 2]
    assert 10 <= time.monotonic() - started < 20
    assert said == [
        "images are decoded in the teacher's actor for the next 60 s, as no host had a free core for 10 s"
    ]
    ray.kill(actor)
    assert float(tasks.begin(partial(values, path, 7))()[0]) == 7
    assert path.read_text().split() == [str(os.getpid())] * 4
    tasks._paused_until = 0.0  # a minute later
    tasks.take_batches()
    assert float(tasks.begin(partial(values, path, 8))()[0]) == 8
    assert tasks.take_batches() == {os.uname().nodename: 1}
