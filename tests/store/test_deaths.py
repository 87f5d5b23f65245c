"""Deaths of processes at a shard, and the record that is their cause."""

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from permafrost.config.models import CifarModelConfig
from permafrost.core.errors import FileError, UserError
from permafrost.storage.files import file_at
from permafrost.storage.local_files import LocalFile
from permafrost.store import deaths as deaths_module
from permafrost.store.deaths import DEATHS_SUFFIX, PoisonRecordError, ShardDeaths, find_fatal
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.processes import fork_server
from tests.support.stores import keys_of_shard, precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

DEATH = 9
SHARD = "train-000000"


def die(folder, shard=SHARD):
    """Start a process that dies at a shard."""
    child = os.fork()
    if child == 0:
        with ShardDeaths(folder, shard):
            os._exit(DEATH)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DEATH


def files_of_deaths(folder):
    return list(Path(folder).rglob(f".*{DEATHS_SUFFIX}"))


# ---- the count -----------------------------------------------------------------------------------


def test_who_ends_well_leaves_nothing(tmp_path):
    with ShardDeaths(tmp_path, SHARD):
        assert len(files_of_deaths(tmp_path)) == 1

    assert files_of_deaths(tmp_path) == []
    assert ShardDeaths(tmp_path, SHARD).count == 0


def test_who_ends_with_an_exception_leaves_nothing(tmp_path):
    for _ in range(3):
        with pytest.raises(KeyError), ShardDeaths(tmp_path, SHARD):
            raise KeyError

    assert files_of_deaths(tmp_path) == []


def test_deaths_are_counted_for_each_shard_until_a_process_ends_by_itself(tmp_path):
    for deaths in range(1, 4):
        die(tmp_path)
        assert ShardDeaths(tmp_path, SHARD).count == deaths
    assert ShardDeaths(tmp_path, "train-000001").count == 0

    with ShardDeaths(tmp_path, SHARD) as work:
        assert work.count == 3

    assert ShardDeaths(tmp_path, SHARD).count == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"x", b"\xff\x00", b"-1\n"])
def test_a_file_that_a_death_cut_is_one_death(tmp_path, content):
    die(tmp_path)
    (path,) = files_of_deaths(tmp_path)
    path.write_bytes(content)

    assert ShardDeaths(tmp_path, SHARD).count == 1


# ---- the cause -----------------------------------------------------------------------------------


def crash():
    faulthandler.disable()  # of pytest, which would print the traceback of every thread
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(DEATH)


def fail():
    raise ValueError("a record that cannot be decoded")


def be_killed():
    os.kill(os.getpid(), signal.SIGTERM)


def work_on(works, key):
    works.get(key, str)()


@pytest.mark.parametrize(
    ("work", "is_death"),
    [(crash, True), (leave, True), (fail, False), (be_killed, False), (str, False)],
)
def test_a_work_that_ends_its_process_is_known_from_one_that_fails(work, is_death):
    fatal = find_fatal(["a", "b", "c"], partial(work_on, {"b": work}))

    assert fatal == ("b" if is_death else None)


@pytest.mark.slow
def test_a_new_interpreter_finds_a_deadly_work_too(monkeypatch):
    monkeypatch.setattr(deaths_module, "_START_METHOD", "spawn")
    assert find_fatal(["a", "b"], partial(work_on, {"b": crash})) == "b"
    assert find_fatal(["a", "b"], partial(work_on, {"b": fail})) is None


@pytest.mark.parametrize("count", [0, 1])  # one may come from outside
def test_no_record_is_tried_before_a_second_death(tmp_path, monkeypatch, count):
    monkeypatch.setattr(deaths_module, "find_fatal", None)
    for _ in range(count):
        die(tmp_path)
    with ShardDeaths(tmp_path, SHARD) as deaths:
        assert deaths.count == count
        deaths.find_cause(["a"], crash)


@pytest.mark.parametrize("error", [None, KeyError("of the shard")])
def test_a_count_that_cannot_be_removed_is_a_warning_and_no_failure_of_the_shard(
    tmp_path, monkeypatch, caplog, error
):
    def refuse(file):
        raise FileError(f"{file.path} cannot be removed (connection refused)")

    monkeypatch.setattr(LocalFile, "remove", refuse)
    expected = contextlib.nullcontext() if error is None else pytest.raises(KeyError)
    logged = caplog.at_level(logging.WARNING, "permafrost")
    with expected, logged, ShardDeaths(tmp_path, SHARD):
        if error is not None:
            raise error
    (warning,) = caplog.messages
    assert f".{SHARD}.deaths could not be removed" in warning


@pytest.mark.parametrize("key", ["a", "k" * 200, "%C3%A9-_"])
def test_a_record_at_which_two_children_die_is_named_and_a_later_command_tries_anew(tmp_path, key):
    die(tmp_path)
    die(tmp_path)
    works = partial(work_on, {"first": fail, key: crash, "last": crash})

    with (
        pytest.raises(PoisonRecordError, match=rf"record {key} \(shard {SHARD}\) ended 4 "),
        ShardDeaths(tmp_path, SHARD) as deaths,
    ):
        deaths.find_cause(["first", key, "last"], works)

    assert files_of_deaths(tmp_path) == []
    assert ShardDeaths(tmp_path, SHARD).count == 0


def test_sound_records_at_which_many_processes_were_killed_are_not_refused(tmp_path):
    for _ in range(5):
        die(tmp_path)

    with ShardDeaths(tmp_path, SHARD) as deaths:
        deaths.find_cause(["a", "b"], partial(append_key, tmp_path / "tried"))

    assert deaths.count == 5
    assert (tmp_path / "tried").read_text() == "ab"


def append_key(path, key):
    with path.open("a") as file:
        file.write(key)


def test_a_child_that_was_killed_once_accuses_nobody(tmp_path):
    die(tmp_path)
    die(tmp_path)

    with ShardDeaths(tmp_path, SHARD) as deaths:
        deaths.find_cause(["a", "b"], partial(die_the_first_time, tmp_path / "killed"))

    assert (tmp_path / "killed").exists()


def die_the_first_time(mark, key):
    if key == "b" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


# ---- records that kill ---------------------------------------------------------------------------


def run_poisoned(store, poison, times, weights="", kills="each"):
    """Run processes one after the other that die at `poison`, and return (exit code, error) of each.

    They are forked from one process, whose zarr has not yet started an event loop that they would wait for.

    kills  "each", or "outside" if a child that is alone with the record lives
    """
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = fork_server().Process(
        target=send_ends, args=(sending, store, poison, times, weights, kills)
    )
    process.start()
    sending.close()
    ends = receiving.recv()
    process.join()
    return ends


def send_ends(sending, store, poison, times, weights, kills):
    from permafrost.annotation.annotator import TeacherAnnotator
    from permafrost_sources.demo import DemoSource

    deaths_module._START_METHOD = "fork"  # the child has what is replaced here
    read, annotate = DemoSource.read, TeacherAnnotator._annotate_batch
    first = os.getpid()

    def kill():
        # What kills from outside does not kill the child that is alone with the record.
        if kills == "each" or os.getppid() == first:
            os.kill(os.getpid(), signal.SIGKILL)

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
    for _ in range(times):
        out, into = os.pipe()
        if os.fork() == 0:
            try:
                precompute.run(precompute_config(store, teacher))
            except UserError as error:
                os.write(into, f"{type(error).__name__}: {error}".encode())
            os._exit(3)
        os.close(into)
        with open(out, "rb") as pipe:  # noqa: PTH123, a descriptor
            ends.append([os.waitstatus_to_exitcode(os.wait()[1]), pipe.read().decode()])
    sending.send(ends)


def images_of(frozen):
    return {n: data for n, data in tree_bytes(frozen.store.path).items() if "teachers/" not in n}


def test_an_image_that_kills_its_reader_is_named_in_the_third_run(frozen, tmp_path):
    store = tmp_path / "store"
    poison = keys_of_shard(frozen.store, frozen.store.manifest.shards[1])[5]

    *deaths, (code, error) = run_poisoned(store, poison, 3)

    assert deaths == [[-9, ""]] * 2
    assert code == 3
    assert error.startswith(f"PoisonRecordError: record {poison} (shard ")
    assert files_of_deaths(store) == []
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
    file_at(store).make_folder()
    for _ in range(2):
        die(store, shard=shard.name)

    precompute.run(precompute_config(store))

    assert tree_bytes(store) == images_of(frozen)


@pytest.mark.slow
def test_a_record_that_kills_the_teacher_is_named_in_the_third_run(frozen, tmp_path, tiny_teacher):
    store = tmp_path / "store"
    shards = frozen.store.manifest.shards
    poison = keys_of_shard(frozen.store, shards[1])[5]
    precompute.run(precompute_config(store))

    # The deaths are in a batch of eight. After them, records are tried one by one.
    *deaths, (code, error) = run_poisoned(store, poison, 3, tiny_teacher.weights)

    assert deaths == [[-9, ""]] * 2
    assert code == 3
    assert error.startswith(f"PoisonRecordError: record {poison} (shard {shards[1].name})")
    assert files_of_deaths(store) == []
    precompute.run(precompute_config(store, tiny_teacher))
    assert tree_bytes(store) == tree_bytes(frozen.store.path)
    assert list(verify_store(store)) == []
    assert len(Store(store).open_passes()) == 1
