"""Real processes that end at any moment and in any way: the repeated command produces the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.config.models import CifarModelConfig
from pipeline.models.providers import build_model
from pipeline.store.journal import JOURNAL_SUFFIX
from pipeline.store.reader import Store
from tests.support.poison import DEADLY_STATUS
from tests.support.processes import (
    StageProcess,
    descendants,
    environment,
    status,
    title,
    wait_until,
)
from tests.support.ray_nodes import ray_nodes
from tests.support.trees import tree_bytes

SHARDS = 8
RECORDS = 24
"""Records per shard, which keep the network below busy for about a tenth of a second."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with images, a teacher's weights and the store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    for number in range(SHARDS * RECORDS):
        path = folder / "photos" / f"class{number % 4}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    torch.manual_seed(0)
    save_file(
        build_model(CifarModelConfig(name="resnet20"), 4).state_dict(), folder / "w.safetensors"
    )
    run(folder, "expected")
    return folder


def words_of(world, store, *words, executor):
    return [
        *("data=image_folder", f"data.path={world / 'photos'}"),
        *("teacher=cifar", f"teacher.weights={world / 'w.safetensors'}"),
        *(f"store.path={world / store}", f"store.shard_size={RECORDS}", f"executor={executor}"),
        *words,
    ]


def run(world, store, *words, executor="serial", succeeds=True, file_limit=None):
    """Run stages.precompute, and return the exit code, standard output and standard error."""
    process = start_precompute(world, store, *words, executor=executor, file_limit=file_limit)
    output, errors = process.communicate(timeout=240)
    assert not succeeds or process.returncode == 0, errors
    return process.returncode, output, errors


def start_precompute(world, store, *words, executor="serial", file_limit=None):
    """Start stages.precompute: the command itself on Ray, which starts processes of its own, else a forked process."""
    words = words_of(world, store, *words, executor=executor)
    if executor == "serial":
        return StageProcess("precompute", words, world, file_limit)
    return subprocess.Popen(
        [sys.executable, "-m", "stages.precompute", *words],
        cwd=world,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Children of a shell's background job would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def open_journals(folder, process):
    """Journals that this process has open, without those that killed processes left."""
    since = Path(f"/proc/{process.pid}").stat().st_mtime_ns
    found = sorted((folder / "receipts").glob(f".*{JOURNAL_SUFFIX}"))
    return [path for path in found if changed(path) > since]


def changed(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # finished meanwhile
        return 0


def receipts(folder):
    return sorted(folder.glob("receipts/*.parquet"))


def passes(store):
    return sorted((store / "teachers").glob("*"))


def stop_inside_a_shard(store, part, process, pid=None):
    """Stop the process, or the worker that `pid` returns, inside a shard after another shard is finished.

    Check that the process is inside the shard: its journal is open, and its receipt is missing.
    """
    while True:
        folder = wait_until(lambda: busy_folder(store, part, process), process, seconds=200)
        worker = pid() if pid else process.pid
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda pid=worker: status(pid) == "T")
        names = [path.stem for path in receipts(folder)]
        at_work = [
            j.name.removeprefix(".").removesuffix(JOURNAL_SUFFIX)
            for j in open_journals(folder, process)
        ]
        if len(at_work) == 1 and at_work[0] not in names:
            assert 0 < len(names) < SHARDS
            assert not (folder / "manifest.json").exists()
            return worker
        os.kill(worker, signal.SIGCONT)  # the process was between two shards


def busy_folder(store, part, process):
    """Folder of the store or pass in which a shard is finished and another one has begun, or None."""
    folders = [store] if part == "pack" else passes(store)
    return next((f for f in folders if receipts(f) and open_journals(f, process)), None)


def assert_same_store(world, store):
    expected, found = tree_bytes(world / "expected"), tree_bytes(world / store)
    assert {n: d for n, d in found.items() if expected.get(n) != d} == {}
    assert set(expected) == set(found)


# ---- one process ---------------------------------------------------------------------------------


ENDS = [
    ("pack", signal.SIGKILL, -9),
    ("pack", signal.SIGTERM, 143),
    ("teacher", signal.SIGINT, 130),
    ("teacher", signal.SIGKILL, -9),
]


def test_a_run_that_is_ended_again_and_again_loses_nothing(world):
    store, finished = world / "ended", {}
    for part, number, code in ENDS:
        process = start_precompute(world, "ended")
        stop_inside_a_shard(store, part, process)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)

        assert process.returncode == code, errors
        if number != signal.SIGKILL:
            assert "the same command resumes where it stopped" in errors
            assert "Traceback" not in errors
        # Shards of earlier runs are not processed again.
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
        finished = {p: p.stat().st_mtime_ns for p in store.rglob("receipts/*.parquet")}
    _, output, _ = run(world, "ended")

    assert_same_store(world, "ended")
    annotated = SHARDS - len(receipts_before(finished, "teachers"))
    assert f"teacher_records: {annotated * RECORDS}" in output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def receipts_before(finished, part):
    return [path for path in finished if part in path.parts]


def test_a_file_that_the_disk_has_no_room_for_is_named_and_the_rest_stays(world):
    """A limit on the size of files simulates a full disk, as the kernel rejects the write halfway."""
    size = max(path.stat().st_size for path in (world / "expected" / "images").iterdir())

    code, _, errors = run(world, "full", succeeds=False, file_limit=size - 4096)

    assert code == 1
    assert "no room to write" in errors
    assert str(world / "full" / "images") in errors
    assert "Traceback" not in errors
    assert not list((world / "full").rglob("*.partial"))
    assert not (world / "full" / "manifest.json").exists()
    run(world, "full")
    assert_same_store(world, "full")


def test_a_second_writer_is_turned_away_and_harms_nothing(world):
    process = start_precompute(world, "shared")
    stop_inside_a_shard(world / "shared", "pack", process)
    code, _, errors = run(world, "shared", succeeds=False)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)

    assert code == 1
    assert f"another process is writing to {world / 'shared'}" in errors
    assert process.wait(timeout=120) == 0
    assert_same_store(world, "shared")


# ---- on Ray --------------------------------------------------------------------------------------


def alive(pids):
    return [pid for pid in pids if title(pid)]


def actor_of(driver):
    """Process id of the only actor below a driver or node."""
    (actor,) = [pid for pid in descendants(driver.pid) if "MapWorker" in title(pid)]
    return actor


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_its_shard_done_again(world):
    process = start_precompute(world, "actor", executor="ray")
    actor = stop_inside_a_shard(world / "actor", "teacher", process, lambda: actor_of(process))
    os.kill(actor, signal.SIGKILL)
    output, errors = process.communicate(timeout=240)

    assert process.returncode == 0, errors
    assert f"teacher_records: {SHARDS * RECORDS}" in output
    assert_same_store(world, "actor")


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_is_killed_takes_ray_with_it_and_the_next_one_goes_on(world):
    process = start_precompute(world, "driver", executor="ray")
    actor = stop_inside_a_shard(world / "driver", "teacher", process, lambda: actor_of(process))
    below = descendants(process.pid)
    process.kill()
    os.kill(actor, signal.SIGCONT)
    process.communicate(timeout=60)
    # Immediately, while an orphaned actor may still be writing.
    _, output, _ = run(world, "driver", executor="ray")

    assert "teacher_records: 0" not in output
    assert_same_store(world, "driver")
    wait_until(lambda: not alive(below))


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_on_ray_is_one_clear_line_and_the_next_run_goes_on(world):
    process = start_precompute(world, "ctrl-c", executor="ray")
    actor = stop_inside_a_shard(world / "ctrl-c", "teacher", process, lambda: actor_of(process))
    os.kill(actor, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130
    assert "the same command resumes where it stopped" in errors
    assert "Traceback" not in errors
    run(world, "ctrl-c")
    assert_same_store(world, "ctrl-c")


@pytest.mark.ray
@pytest.mark.slow
def test_a_raylet_that_is_killed_is_named_and_the_next_run_goes_on(world):
    process = start_precompute(world, "raylet", executor="ray")
    wait_until(lambda: receipts(world / "raylet"), process, seconds=200)
    (raylet,) = [pid for pid in descendants(process.pid) if "/raylet/raylet " in title(pid)]
    os.kill(raylet, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 1
    assert f"Ray's raylet (process {raylet}) ended with status -9" in errors
    assert "The same command resumes where it stopped" in errors
    run(world, "raylet")
    assert_same_store(world, "raylet")


def lose(node):
    """Kill a node and all its processes at once, as a power cut does."""
    below = descendants(node.pid)
    for pid in (node.pid, *below):
        os.kill(pid, signal.SIGKILL)
    node.wait()
    wait_until(lambda: not alive(below))


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_in_the_middle_of_a_shard_is_made_up_for_by_another(world, monkeypatch):
    with ray_nodes() as nodes:
        nodes.start_head("--num-cpus=0", dashboard=False)
        first = nodes.start_node("--num-cpus=1")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        words = ["cluster=existing", f"cluster.address={nodes.address}"]
        process = start_precompute(world, "node", *words, executor="ray")
        stop_inside_a_shard(world / "node", "teacher", process, lambda: actor_of(first))
        lose(first)
        left = open_journals(passes(world / "node")[0], process)
        nodes.start_node("--num-cpus=1")
        output, errors = process.communicate(timeout=240)

    assert len(left) == 1  # the journal of the shard that the node was processing
    assert process.returncode == 0, errors
    assert f"teacher_records: {SHARDS * RECORDS}" in output
    assert_same_store(world, "node")


# ---- a record that kills -------------------------------------------------------------------------


def poisoned(world, store, part, key, executor):
    words = words_of(world, store, executor=executor)
    return subprocess.run(
        [sys.executable, "-m", "tests.support.poison", key, part, *words],
        cwd=world,
        env=environment() | {"DEADLY_KEY": key},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def unique_record(world):
    """Key of a record in the middle of a shard whose image has a unique length."""
    index = Store(world / "expected").index.to_pylist()
    sizes = [row["size"] for row in index]
    return next(
        row["key"]
        for row in index
        if sizes.count(row["size"]) == 1 and 5 < row["row"] < RECORDS - 6
    )


@pytest.mark.slow  # the serial cases are also in test_journal.py
@pytest.mark.parametrize(("part", "deaths"), [("pack", 2), ("teacher", 3)])
def test_a_record_that_kills_its_process_each_time_is_named_in_the_end(world, part, deaths):
    key, store = unique_record(world), f"poisoned-{part}"

    for _ in range(deaths):
        assert poisoned(world, store, part, key, "serial").returncode == DEADLY_STATUS
    done = poisoned(world, store, part, key, "serial")

    assert done.returncode == 1
    assert f"record {key} " in done.stderr
    assert "ended 2 processes" in done.stderr
    run(world, store)  # without the fault
    assert_same_store(world, store)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("part", ["pack", "teacher"])
def test_on_ray_one_command_finishes_all_other_shards_and_names_the_record(world, part):
    key, store = unique_record(world), f"poisoned-ray-{part}"

    done = poisoned(world, store, part, key, "ray")

    assert done.returncode == 1
    assert f"1 of {SHARDS} shards failed" in done.stderr
    assert f"record {key} " in done.stderr
    folder = world / store if part == "pack" else passes(world / store)[0]
    assert len(receipts(folder)) == SHARDS - 1
    run(world, store)
    assert_same_store(world, store)
