"""Journals, which identify a record that kills every process, and the lock that limits a store to one writer."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from permafrost.core.files import make_folder
from permafrost.core.lock import LOCK_NAME, LockedError, lock_folder
from permafrost.store import journal as journal_module
from permafrost.store.journal import (
    JOURNAL_SUFFIX,
    PoisonRecordError,
    ShardJournal,
    ends_process,
)
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from stages import precompute
from tests.support.paths import PYTHONPATH
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


@pytest.fixture
def forked(monkeypatch):
    """Have the child forked, which takes a hundredth of the time of a new interpreter."""
    monkeypatch.setattr(journal_module, "_START_METHOD", "fork")


def crash():
    faulthandler.disable()  # of pytest, which would print the traceback of every thread
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(DEATH)


def fail():
    raise ValueError("a record that cannot be decoded")


def be_killed():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("work", "is_death"),
    [(crash, True), (leave, True), (fail, False), (be_killed, False), (str, False)],
)
def test_a_work_that_ends_its_process_is_known_from_one_that_fails(forked, work, is_death):
    assert ends_process(work) is is_death


@pytest.mark.slow
def test_a_new_interpreter_finds_a_deadly_work_too():
    assert ends_process(crash)
    assert not ends_process(fail)


@pytest.mark.parametrize("key", ["a", "k" * 200, "%C3%A9-_"])
def test_a_record_at_which_a_child_dies_too_is_named_and_a_later_command_tries_anew(
    forked, tmp_path, key
):
    die_at(tmp_path, "fine", key)

    with (
        pytest.raises(PoisonRecordError, match=rf"record {key} \(shard train-000000\) ended 2 "),
        ShardJournal(tmp_path, "train-000000") as journal,
    ):
        journal.try_suspects({key: crash}.get)

    assert journals(tmp_path) == []
    with ShardJournal(tmp_path, "train-000000") as anew:
        assert not anew.follows_a_death


def test_a_sound_record_at_which_many_processes_were_killed_is_not_refused(forked, tmp_path):
    tried = []
    for deaths in range(1, 6):
        die_at(tmp_path, "fine", "slow")
        journal = ShardJournal(tmp_path, "train-000000")
        assert journal.suspects == ["slow"]
        assert not journal.follows_an_unknown_death
        with journal:
            journal.try_suspects(lambda key: tried.append(key) or str)
        assert len(tried) == deaths


def test_deaths_at_two_records_are_two_suspects_the_last_one_first(forked, tmp_path):
    die_at(tmp_path, "a")
    die_at(tmp_path, "b")

    journal = ShardJournal(tmp_path, "train-000000")

    assert journal.suspects == ["b", "a"]
    with pytest.raises(PoisonRecordError, match="record a "), journal:
        journal.try_suspects({"a": crash, "b": fail}.get)


def test_a_suspect_that_is_gone_is_not_tried(tmp_path):
    die_at(tmp_path, "a")

    with ShardJournal(tmp_path, "train-000000") as journal:
        journal.try_suspects(lambda key: None)


def test_deaths_that_name_no_record_accuse_none(tmp_path):
    for _ in range(5):
        die_at(tmp_path)

    journal = ShardJournal(tmp_path, "train-000000")

    assert journal.follows_an_unknown_death
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
    from permafrost.annotation.annotator import TeacherAnnotator
    from permafrost.config.models import CifarModelConfig
    from permafrost.core.errors import UserError
    from permafrost.sources.demo import DemoSource
    from permafrost.store import journal
    from stages import precompute
    from tests.conftest import precompute_config

    store, weights, poison, times, kills = sys.argv[1:]
    journal._START_METHOD = "fork"  # the child has what is replaced here
    read, annotate = DemoSource.read, TeacherAnnotator._annotate_batch

    first = os.getpid()

    def kill():
        # What kills from outside does not kill the child that is alone with the record.
        if kills == "each" or os.getppid() == first:
            os.kill(os.getpid(), 9)

    def poisoned_read(self, record):
        if record.key == poison:
            kill()
        return read(self, record)

    def poisoned_annotate(self, batch, keys, views):
        if poison in keys:
            kill()
        return annotate(self, batch, keys, views)

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


def run_poisoned(store, poison, times, weights="", kills="each"):
    """Run processes one after the other that die at `poison`, and return (exit code, error) of each.

    kills  "each", or "outside" if a child that is alone with the record lives
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUNS), store, weights, poison, str(times), kills],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def images_of(frozen):
    return {n: data for n, data in tree_bytes(frozen.store.path).items() if "teachers/" not in n}


def test_an_image_that_kills_its_reader_is_named_in_the_second_run(frozen, tmp_path):
    store = tmp_path / "store"
    poison = keys_of_shard(frozen.store, frozen.store.manifest.shards[1])[5]

    death, (code, error) = run_poisoned(store, poison, 2)

    assert death == [-9, ""]
    assert code == 3
    assert error.startswith(f"PoisonRecordError: record {poison} (shard ")
    assert journals(store) == []
    precompute.run(precompute_config(store))  # without the fault
    assert tree_bytes(store) == images_of(frozen)


@pytest.mark.slow
def test_a_sound_image_at_which_processes_are_killed_is_read_in_the_end(frozen, tmp_path):
    store = tmp_path / "store"
    poison = keys_of_shard(frozen.store, frozen.store.manifest.shards[1])[5]

    assert run_poisoned(store, poison, 3, kills="outside") == [[-9, ""]] * 3

    precompute.run(precompute_config(store))
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
def test_a_record_that_kills_the_teacher_is_named_in_the_third_run(frozen, tmp_path, tiny_teacher):
    store = tmp_path / "store"
    shards = frozen.store.manifest.shards
    poison = keys_of_shard(frozen.store, shards[1])[5]
    precompute.run(precompute_config(store))

    # The first death is in a batch of eight. After it, records are processed one by one.
    *deaths, (code, error) = run_poisoned(store, poison, 3, tiny_teacher.weights)

    assert deaths == [[-9, ""]] * 2
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
    from permafrost.core.lock import lock_folder

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
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
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
