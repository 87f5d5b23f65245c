"""Job arrays: processes that nobody connects write the bytes of one, whatever happens to some of them."""

import json
import os
import re
import sys
import time
from pathlib import Path
from random import Random

import pytest
from obstore.store import from_url

import permafrost
from permafrost.cli import describe_plan
from permafrost.cluster.array_executor import FAILED_NAME, start_of_task
from permafrost.core.errors import ConfigError
from permafrost.storage import lock
from permafrost.storage.lock import LockedError, folder_lock
from permafrost.storage.rooted_paths import rooted
from permafrost.store.commit import ORIGIN_NAME
from permafrost.store.facts import FACTS_NAME
from permafrost.store.verification import verify_store
from tests.cluster.kill_array import Array, disturb, files_of
from tests.cluster.test_slurm import WORDS
from tests.support.buckets import KEYS, contents, moto_server
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.processes import environment, run_program

SBATCH = """#!/bin/bash
array=${1#--array=}; shift
for SLURM_ARRAY_TASK_ID in ${array//,/ }; do
    export SLURM_ARRAY_TASK_ID
    bash "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Store of one process."""
    store = tmp_path_factory.mktemp("expected") / "store"
    permafrost.precompute(*WORDS, f"store.path={store}", "executor=serial")
    return store


def start(folder, tasks, *, words=WORDS, limit=None, **options):
    array = Array(folder, [[*words, f"store.path={folder / 'store'}"]], tasks, **options)
    for number in range(tasks):
        array.start(number, limit if number == 0 else None)
    return array


def test_tasks_write_the_bytes_of_one_process_and_a_late_one_finds_them(expected, tmp_path):
    array = start(tmp_path, 3, expiry=60)  # nobody is killed, and a busy machine may stall
    assert array.wait() == [0, 0, 0]
    assert files_of(tmp_path / "store") == files_of(expected)
    assert list(verify_store(tmp_path / "store")) == []
    late = permafrost.precompute(*WORDS, f"store.path={tmp_path / 'store'}", "executor=array")
    assert (late.packed_records, late.teacher_records) == (0, 0)


def test_the_claim_of_a_dead_task_is_taken_over(expected, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.5)
    commits = tmp_path / "store/commits"
    commits.mkdir(parents=True)
    for path in (commits / ".train-000001.claim", tmp_path / "store/.lock.claim"):
        path.write_text('{"beat": 7, "holder": "process 1 on gone", "token": "t"}')
    started = time.monotonic()
    permafrost.precompute(*WORDS, f"store.path={tmp_path / 'store'}", "executor=array")
    assert time.monotonic() - started > 1.0
    assert files_of(tmp_path / "store") == files_of(expected)


def test_a_task_that_fails_leaves_a_line_and_the_next_start_tries_its_shard_again(
    expected, tmp_path
):
    """The task may write no file as large as a shard, as on a full disk."""
    array = start(tmp_path, 1, limit=50_000)
    assert array.wait() == [1]
    (line,) = (tmp_path / "store" / FAILED_NAME).read_text().splitlines()
    assert json.loads(line).keys() == {"shard", "host", "cause"}
    assert "no room to write" in line
    assert start(tmp_path, 2).wait() == [0, 0]
    assert files_of(tmp_path / "store") == files_of(expected)


def test_two_teachers_fill_one_store_at_once(expected, tmp_path):
    other = [word.replace("=random", "=random,").rstrip(",") for word in WORDS]
    lists = [
        [*words, f"store.path={tmp_path / 'store'}"]
        for words in (WORDS, [*other, "teacher.width=8"])
    ]
    array = Array(tmp_path, lists, 4, expiry=60)  # nobody is killed, and a busy machine may stall
    for number in range(4):
        array.start(number)
    assert array.wait() == [0] * 4
    assert len(list((tmp_path / "store/teachers").glob("*/manifest.json"))) == 2
    assert files_of(tmp_path / "store").items() >= files_of(expected).items()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_tasks_that_are_killed_at_random_moments_write_the_bytes_of_one_process(
    tmp_path, monkeypatch, place, count_trials
):
    """In the folder two teachers run at once, and one task may at first write no file as large as a shard."""
    words = [*WORDS, "data.train_digits=200"]
    lists = [words] if place == "bucket" else [words, [*words, "teacher.width=8"]]
    for each in lists:
        permafrost.precompute(*each, f"store.path={tmp_path / 'expected'}", "executor=serial")
    with moto_server() as server:
        variables = {"AWS_ENDPOINT_URL": server, "AWS_ALLOW_HTTP": "true"} | KEYS
        variables |= {"PERMAFROST_CACHE": str(tmp_path / "cache")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = "s3://bucket/store" if place == "bucket" else tmp_path / "store"
        lists = [[*each, f"store.path={store}"] for each in lists]
        array = Array(tmp_path, lists, 4, variables=variables)
        dead = disturb(array, 15, Random(0), 1.0, 20_000 if place == "folder" else None)
        while any(array.wait()):  # as the next start of those that have failed
            for number in range(array.tasks):
                array.start(number)
        assert list(verify_store(rooted(str(store)))) == []
        bucket = from_url("s3://bucket", client_options={"allow_http": True})
        made = contents(bucket, "store") if place == "bucket" else files_of(store)
    beside = (ORIGIN_NAME, FACTS_NAME)  # no parts of the store
    made = {name: data for name, data in made.items() if Path(name).name not in beside}
    assert made == files_of(tmp_path / "expected")
    count_trials(f"tasks of a job array, {place}", {"the same bytes": dead})


def test_a_writer_that_wants_the_folder_for_itself_is_refused_beside_tasks(tmp_path):
    with folder_lock(rooted(str(tmp_path)), is_shared=True):
        with folder_lock(rooted(str(tmp_path)), is_shared=True):
            pass
        with pytest.raises(LockedError), folder_lock(rooted(str(tmp_path))):
            pass


@pytest.mark.slow
def test_the_batch_file_of_the_page_starts_tasks_of_any_numbers(expected, tmp_path):
    page = ROOT / "docs/howto/job-arrays.md"
    (batch,) = (block.code for block in blocks_of(page, "sh") if "#SBATCH" in block.code)
    (tmp_path / "job").write_text(batch.replace("source .venv/bin/activate\n", ""))
    (tmp_path / "sbatch").write_text(SBATCH)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = ["bash", "sbatch", "--array=1,3,7", "job", "precompute", *WORDS, "store.path=store"]
    done = run_program(words, cwd=tmp_path, env=environment() | {"PATH": path})
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "store") == files_of(expected)


@pytest.mark.slow
def test_a_plan_says_how_many_tasks_pay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = describe_plan("precompute", [*WORDS, "store.path=new", "executor=array"])
    assert re.fullmatch(
        r"up to 1 pay, .* of 6 shards of .* s; with 1 each .* memory", plan["tasks"]
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("variables", "part", "start"),
    [
        ({}, "1/4", 0.0),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "4/4", 0.75),
        ({"SLURM_ARRAY_TASK_ID": "0", "SGE_TASK_ID": "undefined"}, "", 0.0),
        ({"SGE_TASK_ID": "undefined", "PBS_ARRAY_INDEX": "1"}, "", 0.618),
    ],
)
def test_the_part_or_the_number_of_the_scheduler_chooses_where_a_task_begins(
    monkeypatch, variables, part, start
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert start_of_task(part) == pytest.approx(start, abs=1e-3)


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "a/b", "1/"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(ConfigError, match=f"^cluster.part={part} must be"):
        permafrost.precompute(*WORDS, "store.path=new", "executor=array", f"cluster.part={part}")
