"""Journals, which identify a record that kills every process, and the lock that limits a store to one writer."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline.core.files import make_folder
from pipeline.core.lock import LOCK_NAME, LockedError, lock_folder
from pipeline.store.journal import JOURNAL_SUFFIX, PoisonRecordError, ShardJournal
from pipeline.store.reader import Store
from pipeline.store.verification import verify_store
from stages import precompute
from tests.support.paths import ROOT
from tests.support.stores import keys_of_shard, precompute_config
from tests.support.trees import tree_bytes

DEATH = 9


def die_at(folder, *keys, shard="train-000000"):
    """Start a process that records each key in the journal and dies at the last one."""
    child = os.fork()
    if child == 0:
        with ShardJournal(folder, shard) as journal:
            for key in keys:
                journal.at(key)
            os._exit(DEATH)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DEATH


def journals(folder):
    return list(Path(folder).rglob(f".*{JOURNAL_SUFFIX}"))


# ---- the journal ---------------------------------------------------------------------------------


def test_who_ends_well_leaves_no_journal(tmp_path):
    with ShardJournal(tmp_path, "train-000000") as journal:
        journal.at("a")
        assert len(journals(tmp_path)) == 1

    assert journals(tmp_path) == []
    assert not ShardJournal(tmp_path, "train-000000").follows_a_death


def test_who_ends_with_an_exception_leaves_no_journal(tmp_path):
    def fail():
        with ShardJournal(tmp_path, "train-000000") as journal:
            journal.at("a")
            raise KeyError

    for _ in range(3):
        with pytest.raises(KeyError):
            fail()

    assert journals(tmp_path) == []


def test_a_death_is_known_to_the_next_process_with_its_record(tmp_path):
    die_at(tmp_path, "a", "b")

    journal = ShardJournal(tmp_path, "train-000000")

    assert journal.follows_a_death
    assert journal.suspects == ["b"]
    assert ShardJournal(tmp_path, "train-000001").suspects == []
    with journal:
        journal.at("b")
    assert journals(tmp_path) == []


@pytest.mark.parametrize("key", ["a", "k" * 200, "%C3%A9-_"])
def test_two_deaths_at_one_record_name_it_and_a_later_command_tries_anew(tmp_path, key):
    die_at(tmp_path, "fine", key)
    die_at(tmp_path, "fine", "also-fine", key)
    journal = ShardJournal(tmp_path, "train-000000")

    with pytest.raises(PoisonRecordError, match=rf"record {key} \(shard train-000000\) ended 2 "):
        journal.__enter__()

    assert journals(tmp_path) == []
    with ShardJournal(tmp_path, "train-000000") as anew:
        assert not anew.follows_a_death


def test_deaths_at_two_records_are_two_suspects_the_last_one_first(tmp_path):
    die_at(tmp_path, "a")
    die_at(tmp_path, "b")

    journal = ShardJournal(tmp_path, "train-000000")

    assert journal.suspects == ["b", "a"]
    with journal:
        pass
    die_at(tmp_path, "a")
    die_at(tmp_path, "b")
    die_at(tmp_path, "a")
    with pytest.raises(PoisonRecordError, match="record a "):
        ShardJournal(tmp_path, "train-000000").__enter__()


def test_deaths_that_name_no_record_accuse_none(tmp_path):
    for _ in range(5):
        die_at(tmp_path)

    journal = ShardJournal(tmp_path, "train-000000")

    assert journal.follows_a_death
    assert journal.suspects == []
    with journal:
        journal.at("a")


def test_a_shorter_key_replaces_a_longer_one(tmp_path):
    die_at(tmp_path, "a-long-key", "b")

    assert ShardJournal(tmp_path, "train-000000").suspects == ["b"]


def test_a_journal_cut_by_a_death_while_it_is_written_is_read(tmp_path):
    die_at(tmp_path, "a")
    die_at(tmp_path, "b")
    (path,) = journals(tmp_path)
    whole = path.read_bytes()

    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        journal = ShardJournal(tmp_path, "train-000000")
        assert journal.follows_a_death
        assert set(journal.suspects) <= {"a", "b"}
        with journal:
            pass


# ---- records that kill ---------------------------------------------------------------------------


RUNS = """
    import json, os, sys
    from pathlib import Path
    import zarr, zarr.codecs, zarr.storage  # once, and not in each of the processes
    from pipeline.annotation.annotator import TeacherAnnotator
    from pipeline.config.models import CifarModelConfig
    from pipeline.core.errors import UserError
    from pipeline.sources.demo import DemoSource
    from stages import precompute
    from tests.conftest import precompute_config

    store, weights, poison, times = sys.argv[1:]
    read, annotate = DemoSource.read, TeacherAnnotator._annotate_batch

    def kill():
        os.kill(os.getpid(), 9)

    def poisoned_read(self, record):
        return kill() if record.key == poison else read(self, record)

    def poisoned_annotate(self, batch, keys, views):
        return kill() if poison in keys else annotate(self, batch, keys, views)

    teacher = CifarModelConfig(name="resnet8", width=4, weights=weights) if weights else None
    if weights:
        TeacherAnnotator._annotate_batch = poisoned_annotate
    else:
        DemoSource.read = poisoned_read
    ends = []
    for _ in range(int(times)):
        out, into = os.pipe()
        if os.fork() == 0:
            try:
                precompute.run(precompute_config(Path(store), teacher))
            except UserError as error:
                os.write(into, f"{type(error).__name__}: {error}".encode())
            os._exit(3)
        os.close(into)
        ends.append((os.waitstatus_to_exitcode(os.wait()[1]), os.read(out, 10_000).decode()))
    print(json.dumps(ends))
"""


def run_poisoned(store, poison, times, weights=""):
    """Run processes one after the other that die at `poison`, and return (exit code, error) of each."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNS), store, weights, poison, str(times)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def images_of(frozen):
    return {n: data for n, data in tree_bytes(frozen.store.path).items() if "teachers/" not in n}


def test_an_image_that_kills_its_reader_is_named_in_the_third_run(frozen, tmp_path):
    store = tmp_path / "store"
    poison = keys_of_shard(frozen.store, frozen.store.manifest.shards[1])[5]

    *deaths, (code, error) = run_poisoned(store, poison, 3)

    assert deaths == [[-9, ""]] * 2
    assert code == 3
    assert error.startswith(f"PoisonRecordError: record {poison} (shard ")
    assert journals(store) == []
    precompute.run(precompute_config(store))  # without the fault
    assert tree_bytes(store) == images_of(frozen)


def test_a_death_that_does_not_come_again_leaves_no_trace(frozen, tmp_path):
    store = tmp_path / "store"
    shard = frozen.store.manifest.shards[0]
    make_folder(store)
    die_at(store, keys_of_shard(frozen.store, shard)[-1], shard=shard.name)

    precompute.run(precompute_config(store))

    assert tree_bytes(store) == images_of(frozen)


def test_a_suspect_that_is_no_longer_in_the_data_is_forgotten(frozen, tmp_path):
    store = tmp_path / "store"
    make_folder(store)
    die_at(store, "taken-out", shard=frozen.store.manifest.shards[0].name)

    precompute.run(precompute_config(store))

    assert tree_bytes(store) == images_of(frozen)


@pytest.mark.slow
def test_a_record_that_kills_the_teacher_is_named_in_the_fourth_run(frozen, tmp_path, tiny_teacher):
    store = tmp_path / "store"
    shards = frozen.store.manifest.shards
    poison = keys_of_shard(frozen.store, shards[1])[5]
    precompute.run(precompute_config(store))

    # The first death is in a batch of eight. After it, records are processed one by one.
    *deaths, (code, error) = run_poisoned(store, poison, 4, tiny_teacher.weights)

    assert deaths == [[-9, ""]] * 3
    assert code == 3
    assert error.startswith(f"PoisonRecordError: record {poison} (shard {shards[1].name})")
    assert journals(store) == []
    precompute.run(precompute_config(store, tiny_teacher))
    assert tree_bytes(store) == tree_bytes(frozen.store.path)
    assert list(verify_store(store)) == []
    assert len(Store(store).open_passes()) == 1


# ---- the lock ------------------------------------------------------------------------------------


HOLD = """
    import sys, time
    from pathlib import Path
    from pipeline.core.lock import lock_folder

    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Process that holds the lock of <tmp_path>/store."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), tmp_path / "store"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_turned_away_at_once_and_the_lock_dies_with_its_holder(holder, tmp_path):
    store = tmp_path / "store"

    with pytest.raises(
        LockedError, match=rf"another process is writing to {store}; wait .*or choose"
    ):
        precompute.run(precompute_config(store))
    assert holder.poll() is None
    assert [path.name for path in store.iterdir()] == [LOCK_NAME]

    holder.kill()
    holder.wait()
    precompute.run(precompute_config(store))
    assert list(verify_store(store)) == []


def test_another_folder_is_free(holder, tmp_path):
    with lock_folder(tmp_path / "other"):
        pass


def test_the_lock_is_free_after_an_error(tmp_path):
    def fail():
        with lock_folder(tmp_path):
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    with lock_folder(tmp_path), pytest.raises(LockedError), lock_folder(tmp_path):
        pass
