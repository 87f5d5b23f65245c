"""Real processes that die, at any moment and in any way: the same command again makes the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
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
from tests.pipeline.store.test_round_trip import tree_bytes
from tests.stages.poison import DEADLY_STATUS
from tests.stages.ray_nodes import ray_nodes

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 12
RECORDS = 40
"""Of a shard; with the network below it is at work for about a third of a second."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of images, a teacher's weights and the store that an undisturbed run makes of them."""
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


def command(world, store, *words, executor="serial"):
    return [
        *(sys.executable, "-m", "stages.precompute", "data=image_folder"),
        f"data.path={world / 'photos'}",
        *("teacher=cifar", f"teacher.weights={world / 'w.safetensors'}"),
        *(f"store.path={world / store}", f"store.shard_size={RECORDS}", f"executor={executor}"),
        *words,
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(world, store, *words, executor="serial", limit=None):
    """The finished process."""
    done = subprocess.run(
        command(world, store, *words, executor=executor),
        cwd=world,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        timeout=240,
    )
    if limit is None:
        assert done.returncode == 0, done.stderr
    return done


def start(world, store, *words, executor="serial"):
    return subprocess.Popen(
        command(world, store, *words, executor=executor),
        cwd=world,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background has their children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def journals(folder, process):
    """Of the shards that this process is at; a killed one's stay behind."""
    since = Path(f"/proc/{process.pid}").stat().st_mtime_ns
    found = sorted((folder / "receipts").glob(f".*{JOURNAL_SUFFIX}"))
    return [path for path in found if changed(path) > since]


def changed(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # finished in between
        return 0


def receipts(folder):
    return sorted(folder.glob("receipts/*.parquet"))


def passes(store):
    return sorted((store / "teachers").glob("*"))


def wait_until(condition, process=None, seconds=90):
    """The condition's first true value; the process, if any, must not end before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def stop_inside_a_shard(store, part, process, pid=None):
    """Stop the process (or the one that works for it) while it is in a shard and another is finished.

    Asserts that the fault will happen there: that shard's journal is open, its receipt is missing.
    """
    while True:
        folder = wait_until(lambda: busy_folder(store, part, process), process, seconds=200)
        worker = pid() if pid else process.pid
        os.kill(worker, signal.SIGSTOP)
        wait_until(lambda pid=worker: status(pid) == "T")
        names = [path.stem for path in receipts(folder)]
        at_work = [
            j.name.removeprefix(".").removesuffix(JOURNAL_SUFFIX) for j in journals(folder, process)
        ]
        if len(at_work) == 1 and at_work[0] not in names:
            assert 0 < len(names) < SHARDS
            assert not (folder / "manifest.json").exists()
            return worker
        os.kill(worker, signal.SIGCONT)  # it was between two shards


def busy_folder(store, part, process):
    """The store's or the pass's folder, once a shard in it is finished and another one begun."""
    folders = [store] if part == "pack" else passes(store)
    return next((f for f in folders if receipts(f) and journals(f, process)), None)


def status(pid):
    """R, S, T (stopped), ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


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
        process = start(world, "ended")
        stop_inside_a_shard(store, part, process)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)

        assert process.returncode == code, errors
        if number != signal.SIGKILL:
            assert "the same command goes on where it stopped" in errors
            assert "Traceback" not in errors
        # What a former run finished was not done again.
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
        finished = {p: p.stat().st_mtime_ns for p in store.rglob("receipts/*.parquet")}
    done = run(world, "ended")

    assert_same_store(world, "ended")
    annotated = SHARDS - len(receipts_before(finished, "teachers"))
    assert f"teacher_records: {annotated * RECORDS}" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def receipts_before(finished, part):
    return [path for path in finished if part in path.parts]


def test_a_file_that_the_disk_has_no_room_for_is_named_and_the_rest_stays(world):
    """The limit on a file's size stands for a full disk: the kernel refuses the write half-way."""
    size = max(path.stat().st_size for path in (world / "expected" / "images").iterdir())

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 4096, size - 4096))

    done = run(world, "full", limit=limit)

    assert done.returncode == 1
    assert "no room to write" in done.stderr
    assert str(world / "full" / "images") in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((world / "full").rglob("*.partial"))
    assert not (world / "full" / "manifest.json").exists()
    run(world, "full")
    assert_same_store(world, "full")


def test_a_second_writer_is_turned_away_and_harms_nothing(world):
    process = start(world, "shared")
    stop_inside_a_shard(world / "shared", "pack", process)
    second = run(world, "shared", limit=lambda: None)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)

    assert second.returncode == 1
    assert f"another process is writing to {world / 'shared'}" in second.stderr
    assert process.wait(timeout=120) == 0
    assert_same_store(world, "shared")


# ---- on Ray --------------------------------------------------------------------------------------


def descendants(pid):
    """Process ids below `pid`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pids):
    return [pid for pid in pids if title(pid)]


def actor_of(driver):
    """The process id of the one actor that works below a driver, or a node."""
    (actor,) = [pid for pid in descendants(driver.pid) if "MapWorker" in title(pid)]
    return actor


@pytest.mark.ray
@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced_and_its_shard_done_again(world):
    process = start(world, "actor", executor="ray")
    actor = stop_inside_a_shard(world / "actor", "teacher", process, lambda: actor_of(process))
    os.kill(actor, signal.SIGKILL)
    output, errors = process.communicate(timeout=240)

    assert process.returncode == 0, errors
    assert f"teacher_records: {SHARDS * RECORDS}" in output
    assert_same_store(world, "actor")


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_is_killed_takes_ray_with_it_and_the_next_one_goes_on(world):
    process = start(world, "driver", executor="ray")
    actor = stop_inside_a_shard(world / "driver", "teacher", process, lambda: actor_of(process))
    below = descendants(process.pid)
    process.kill()
    os.kill(actor, signal.SIGCONT)
    process.communicate(timeout=60)
    done = run(world, "driver", executor="ray")  # at once: an orphaned actor may still be writing

    assert "teacher_records: 0" not in done.stdout
    assert_same_store(world, "driver")
    wait_until(lambda: not alive(below))


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_on_ray_is_one_clear_line_and_the_next_run_goes_on(world):
    process = start(world, "ctrl-c", executor="ray")
    actor = stop_inside_a_shard(world / "ctrl-c", "teacher", process, lambda: actor_of(process))
    os.kill(actor, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the whole group
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130
    assert "the same command goes on where it stopped" in errors
    assert "Traceback" not in errors
    run(world, "ctrl-c")
    assert_same_store(world, "ctrl-c")


def lose(node):
    """A node as a power cut takes it: itself and all that works on it, at once."""
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
        process = start(world, "node", *words, executor="ray")
        stop_inside_a_shard(world / "node", "teacher", process, lambda: actor_of(first))
        lose(first)
        left = journals(passes(world / "node")[0], process)
        nodes.start_node("--num-cpus=1")
        output, errors = process.communicate(timeout=240)

    assert len(left) == 1  # the shard that it was at
    assert process.returncode == 0, errors
    assert f"teacher_records: {SHARDS * RECORDS}" in output
    assert_same_store(world, "node")


# ---- a record that kills -------------------------------------------------------------------------


def poisoned(world, store, part, key, executor):
    words = command(world, store, executor=executor)[3:]
    return subprocess.run(
        [sys.executable, "-m", "tests.stages.poison", key, part, *words],
        cwd=world,
        env=environment() | {"DEADLY_KEY": key},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def unique_record(world):
    """A key in the middle of a shard whose image has a length that no other has."""
    index = Store(world / "expected").index.to_pylist()
    sizes = [row["size"] for row in index]
    return next(
        row["key"] for row in index if sizes.count(row["size"]) == 1 and 5 < row["row"] < 30
    )


@pytest.mark.slow  # on Ray; test_journal.py has the serial ones
@pytest.mark.parametrize(("part", "deaths"), [("pack", 2), ("teacher", 3)])
def test_a_record_that_kills_its_process_each_time_is_named_in_the_end(world, part, deaths):
    key, store = unique_record(world), f"poisoned-{part}"

    for _ in range(deaths):
        assert poisoned(world, store, part, key, "serial").returncode == DEADLY_STATUS
    done = poisoned(world, store, part, key, "serial")

    assert done.returncode == 1
    assert f"record {key} " in done.stderr
    assert "ended 2 processes" in done.stderr
    run(world, store)  # without the bug
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
