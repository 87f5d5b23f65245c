"""Real processes that end at any moment and in any way: the repeated command produces the same bytes."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from permafrost.config.models import CifarModelConfig
from permafrost.models.providers import build_model
from permafrost.store.deaths import DEATHS_SUFFIX
from permafrost.store.reader import Store
from tests.support.paths import PYTHONPATH
from tests.support.processes import (
    StageProcess,
    alive,
    descendants,
    environment,
    run_program,
    status,
    title,
    wait_until,
)
from tests.support.ray_nodes import lose, ray_nodes
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
    output, errors = process.communicate()
    assert not succeeds or process.returncode == 0, errors
    return process.returncode, output, errors


def start_precompute(world, store, *words, executor="serial", file_limit=None, stop_at=None):
    """Start stages.precompute: the command itself on Ray, which starts processes of its own, else a forked process.

    stop_at  (part, key) of the record at which a process stops itself, see `stopped`
    """
    words = words_of(world, store, *words, executor=executor)
    module = "stages.precompute"
    if stop_at is not None:
        module, words = "tests.support.poison", [*stop_at, str(stop_file(world, store)), *words]
    if executor == "serial":
        return StageProcess(module, words, world, file_limit)
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=world,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Children of a shell's background job would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stop_file(world, store):
    return world / f"{store}.stopped"


def stopped(world, store, process):
    """Wait until a process has stopped itself inside a shard, and return its id.

    Check that a shard is finished and that one or, with the one that follows, two are not: their counts of deaths are
    there, and their commit markers are missing.
    """
    file = stop_file(world, store)
    pid = int(wait_until(lambda: file.exists() and file.read_text().strip(), process))
    wait_until(lambda: status(pid) == "T")
    (folder,) = {path.parent.parent for path in files_of_deaths(world / store)}
    begun = {path.name[1:].removesuffix(DEATHS_SUFFIX) for path in files_of_deaths(folder)}
    names = [path.stem for path in markers(folder)]
    assert 0 < len(names) < SHARDS
    assert len(begun) in (1, 2)
    assert begun.isdisjoint(names)
    assert not (folder / "manifest.json").exists()
    return pid


def record_in_the_middle(world, number):
    """Key of a record in the middle of a shard, given its number."""
    return Store(world / "expected").index.shard_keys(number)[RECORDS // 2]


def files_of_deaths(folder):
    return sorted(folder.rglob(f"commits/.*{DEATHS_SUFFIX}"))


def markers(folder):
    return sorted(folder.glob("commits/*.parquet"))


def passes(store):
    return sorted((store / "teachers").glob("*"))


def assert_same_store(world, store):
    expected, found = tree_bytes(world / "expected"), tree_bytes(world / store)
    assert {n: d for n, d in found.items() if expected.get(n) != d} == {}
    assert set(expected) == set(found)


# ---- one process ---------------------------------------------------------------------------------


def test_a_signal_to_a_process_that_has_ended_is_no_error(tmp_path, monkeypatch):
    process = StageProcess("stages.precompute", ["--help"], tmp_path)
    assert process.wait() == 0

    process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(process, "poll", lambda: None)  # as if it ended just after this was asked
    process.send_signal(signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["images", "teachers"])
def test_a_file_that_the_disk_has_no_room_for_is_named_and_the_rest_stays(world, folder):
    """A limit on the size of files simulates a full disk, as the kernel rejects the write halfway."""
    store, whole = f"full-{folder}", world / "expected"
    size = max(path.stat().st_size for path in (whole / folder).rglob("*") if path.is_file())
    if folder == "teachers":
        shutil.copytree(whole, world / store, ignore=shutil.ignore_patterns(folder))

    code, _, errors = run(world, store, succeeds=False, file_limit=size * 3 // 4)

    last = errors.splitlines()[-1]
    assert code == 1
    assert last.startswith("permafrost precompute: error: no room to write "), last
    assert f"{store}/{folder}/" in last
    assert "Traceback" not in errors
    partial = {path.name for path in (world / store).rglob("*.partial")}
    assert partial <= {".description.partial"}  # of a pass that is not finished
    assert (world / store / "manifest.json").exists() == (folder == "teachers")
    assert not list((world / store).glob("teachers/*/manifest.json"))
    run(world, store)
    assert_same_store(world, store)


@pytest.mark.slow
def test_a_second_writer_is_turned_away_and_harms_nothing(world):
    key = record_in_the_middle(world, 2)
    process = start_precompute(world, "shared", stop_at=("pack", key))
    stopped(world, "shared", process)
    code, _, errors = run(world, "shared", succeeds=False)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)

    assert code == 1
    assert "another process is writing to shared" in errors
    assert process.wait() == 0
    assert_same_store(world, "shared")


# ---- on Ray --------------------------------------------------------------------------------------


def actor_of(driver):
    """Process id of the only actor below a driver or node."""
    (actor,) = [pid for pid in descendants(driver.pid) if "_ShardActor" in title(pid)]
    return actor


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_is_killed_takes_ray_with_it_and_the_next_one_goes_on(world, count_trials):
    stop_at = ("teacher", record_in_the_middle(world, 2))
    process = start_precompute(world, "driver", executor="ray", stop_at=stop_at)
    actor = stopped(world, "driver", process)
    assert actor == actor_of(process)
    below = descendants(process.pid)
    process.kill()
    os.kill(actor, signal.SIGCONT)
    process.communicate()
    # Immediately, while an orphaned actor may still be writing.
    _, output, _ = run(world, "driver", executor="ray")

    assert "teacher_records: 0" not in output
    assert_same_store(world, "driver")
    wait_until(lambda: not alive(below))
    count_trials("the driver of a local Ray", {"the same bytes": 1})


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_on_ray_is_one_clear_line_and_the_next_run_goes_on(world):
    stop_at = ("teacher", record_in_the_middle(world, 2))
    process = start_precompute(world, "ctrl-c", executor="ray", stop_at=stop_at)
    actor = stopped(world, "ctrl-c", process)
    assert actor == actor_of(process)
    os.kill(actor, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
    _, errors = process.communicate()

    assert process.returncode == 130
    assert "the same command resumes where it stopped" in errors
    assert "Traceback" not in errors
    run(world, "ctrl-c")
    assert_same_store(world, "ctrl-c")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_head_that_is_killed_is_named_and_leaves_no_process(world, count_trials, name):
    process = start_precompute(world, name, executor="ray")
    wait_until(lambda: markers(world / name), process)
    started = descendants(process.pid)
    (head,) = [pid for pid in started if f"/{name} " in title(pid)]
    os.kill(head, signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]

    assert process.returncode == 1
    assert f"Ray's {name} (process {head}) ended with status -9" in errors
    wait_until(lambda: not alive(started))
    run(world, name)
    assert_same_store(world, name)
    count_trials(f"the {name} of a local Ray", {"the same bytes": 1})


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_in_the_middle_of_a_shard_is_made_up_for_by_another(
    world, monkeypatch, count_trials
):
    with ray_nodes(PYTHONPATH=PYTHONPATH) as nodes:  # for tests.support.poison
        nodes.start_head("--num-cpus=0", dashboard=False)
        first = nodes.start_node("--num-cpus=1")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        words = ["cluster=existing", f"cluster.address={nodes.address}"]
        stop_at = ("teacher", record_in_the_middle(world, 2))
        process = start_precompute(world, "node", *words, executor="ray", stop_at=stop_at)
        assert stopped(world, "node", process) == actor_of(first)
        lose(first)
        left = files_of_deaths(world / "node")
        nodes.start_node("--num-cpus=1")
        output, errors = process.communicate()

    assert len(left) == 1  # of the shard that the node was processing
    assert process.returncode == 0, errors
    assert f"teacher_records: {SHARDS * RECORDS}" in output
    assert_same_store(world, "node")
    count_trials("the only node of a cluster, replaced", {"the same bytes": 1})


# ---- a record that kills -------------------------------------------------------------------------


def poisoned(world, store, part, key, executor):
    words = words_of(world, store, executor=executor)
    return run_program(
        [sys.executable, "-m", "tests.support.poison", part, key, "-", *words],
        cwd=world,
        env=environment(),
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("part", ["pack", "teacher"])
def test_on_ray_one_command_finishes_all_other_shards_and_names_the_record(world, part):
    key, store = record_in_the_middle(world, 3), f"poisoned-ray-{part}"

    done = poisoned(world, store, part, key, "ray")

    assert done.returncode == 1
    assert f"1 of {SHARDS} shards failed" in done.stderr
    assert f"record {key} " in done.stderr
    folder = world / store if part == "pack" else passes(world / store)[0]
    assert len(markers(folder)) == SHARDS - 1
    run(world, store)
    assert_same_store(world, store)
