"""Crashes after any file operation: a file is then old, new or absent, and never partial."""

import errno
import io
import os
import shutil
from pathlib import Path

import pytest

from permafrost.annotation.shard_tasks import AnnotateShard
from permafrost.config.store import PassOptions
from permafrost.core.errors import FileError
from permafrost.storage import files, local_files
from permafrost.storage.files import file_at
from permafrost.store.deaths import DEATHS_SUFFIX
from permafrost.store.entries import ManifestError
from permafrost.store.facts import FACTS_NAME
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from tests.support.crashes import Stopped, StoppingOs, stop_everywhere
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

EVERY_POINT = pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 13])
"""Step between crash points. With 13, `make test` still covers every kind, as a commit has eight operations."""


def test_a_file_is_old_or_new_at_every_point(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def replace_file(_):
        path.write_bytes(b"old")
        files.file_at(path).write(b"new")

    points = stop_everywhere(
        monkeypatch, replace_file, lambda _: assert_one_of(path, (b"old", b"new"))
    )

    # Open, write, fsync, close and replace of the file; open, fsync and close of the folder.
    assert points == 8
    assert path.read_bytes() == b"new"


def test_a_new_file_is_absent_or_whole_at_every_point(tmp_path, monkeypatch):
    def write(point):
        files.file_at(tmp_path / str(point) / "deep" / "file").write(b"new")

    def check(point):
        path = tmp_path / str(point) / "deep" / "file"
        assert not path.exists() or path.read_bytes() == b"new"

    # Two folders are added: each is made, and its parent is opened, synced and closed.
    assert stop_everywhere(monkeypatch, write, check) == 8 + 2 * 4


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def fail_halfway():
        with files.file_at(tmp_path / "file").open_atomically() as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()

    assert list(tmp_path.iterdir()) == []


def test_old_partial_files_of_a_folder_are_removed_and_those_of_other_writers_stay(tmp_path):
    names = [".report.html.1f.partial", ".report.json.2e.partial", ".student.onnx.3d.partial"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    os.utime(tmp_path / names[2], (0, 0))
    files.remove_old_partial_files(tmp_path, "report")
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


@EVERY_POINT
def test_stopping_anywhere_while_packing_loses_nothing(tmp_path, monkeypatch, every):
    precompute.run(packing(tmp_path / "expected"))
    expected = tree_bytes(tmp_path / "expected")

    def pack(point):
        precompute.run(packing(tmp_path / str(point)))

    def check(point):
        store = tmp_path / str(point)
        kept = {(name, data) for name, data in finished(store) if name != FACTS_NAME}
        assert kept <= expected.items()
        # The crash came after the rename, so the store is complete.
        if (store / "manifest.json").exists():
            assert dict(kept) == {n: data for n, data in expected.items() if n != FACTS_NAME}
        else:
            with pytest.raises(ManifestError):
                Store(store)
        precompute.run(packing(store))
        assert tree_bytes(store) == expected

    points = stop_everywhere(monkeypatch, pack, check, every)

    # Tars and commit markers of four shards, index and manifest.
    assert points >= 4 * (8 + 8) + 8 + 8


@EVERY_POINT
def test_stopping_anywhere_in_a_teacher_pass_loses_nothing(
    tmp_path, monkeypatch, tiny_teacher, every
):
    packed = tmp_path / "packed"
    precompute.run(packing(packed))
    precompute.run(packing(shutil.copytree(packed, tmp_path / "expected"), tiny_teacher))
    expected = tree_bytes(tmp_path / "expected")
    computed = count_computed_shards(monkeypatch)

    def annotate(point):
        store = shutil.copytree(packed, tmp_path / str(point))
        precompute.run(packing(store, tiny_teacher))

    def check(point):
        store = tmp_path / str(point)
        assert finished(store) <= expected.items()
        published = Store(store).pass_folders()
        assert not published or dict(finished(store)) == expected
        missing = 4 - len(list(store.glob("teachers/*/commits/*.parquet")))
        computed.clear()
        precompute.run(packing(store, tiny_teacher))
        assert len(computed) == missing
        assert tree_bytes(store) == expected

    points = stop_everywhere(monkeypatch, annotate, check, every)

    # Array and group, chunks and commit markers of four shards, manifest.
    assert points >= 2 * 8 + 4 * (8 + 8) + 8


def test_leftovers_of_a_stopped_commit_are_swept_by_the_next_run(tmp_path, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        # Three folders are made with 4 operations each, then a tar is opened, written and synced.
        patch.setattr(local_files, "os", StoppingOs(3 * 4 + 3))
        with pytest.raises(Stopped):
            precompute.run(precompute_config(store))
    assert any(local_files.PARTIAL_SUFFIX in path.name for path in store.rglob(".*"))

    precompute.run(precompute_config(store))

    assert not any(local_files.PARTIAL_SUFFIX in path.name for path in store.rglob(".*"))
    assert list(verify_store(store)) == []


def finished(store: Path):
    """Files with their final names, without the count of deaths at the shard where the process ended."""
    return {
        (name, data)
        for name, data in tree_bytes(store).items()
        if not name.endswith((local_files.PARTIAL_SUFFIX, DEATHS_SUFFIX))
    }


def packing(store, teacher=None):
    """Options of a precompute with few file operations: four shards, one per split, and logits only."""
    annotate = PassOptions(outputs=("logits",), batch_size=64)
    return precompute_config(store, teacher, shard_size=64, annotate=annotate)


def count_computed_shards(monkeypatch):
    computed = []
    original = AnnotateShard.__call__

    def counting(self, shard):
        computed.append(shard.name)
        return original(self, shard)

    monkeypatch.setattr(AnnotateShard, "__call__", counting)
    return computed


def assert_one_of(path, allowed):
    assert path.read_bytes() in allowed


def test_a_rename_that_was_done_and_whose_answer_was_lost_is_no_error(tmp_path, monkeypatch):
    """A file server repeats a request whose answer did not arrive, and the second time there is no file to rename."""

    def renamed(*names, **folders):
        replace(*names, **folders)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    path, replace = tmp_path / "file", os.replace
    with monkeypatch.context() as patch:
        patch.setattr(local_files.os, "replace", renamed)
        file_at(path).write(b"new")
        assert path.read_bytes() == b"new"

        patch.setattr(local_files.os, "replace", lambda *_, **__: replace("never", "file"))
        with pytest.raises(FileError, match="cannot be written"):
            file_at(path).write(b"newer")
    assert path.read_bytes() == b"new"


def test_a_new_file_that_another_process_removed_as_a_leftover_is_written_again(
    tmp_path, monkeypatch
):
    replace, calls = os.replace, []

    def removed_first(name, *names, src_dir_fd, **folders):
        calls.append(name)
        if len(calls) == 1:
            os.unlink(name, dir_fd=src_dir_fd)
        replace(name, *names, src_dir_fd=src_dir_fd, **folders)

    monkeypatch.setattr(local_files.os, "replace", removed_first)
    file_at(tmp_path / "file").write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert len(calls) == 2


def test_a_claim_is_whole_however_little_the_system_takes_at_once(tmp_path, monkeypatch):
    """A claim in part is that of an unknown process, for which others wait a minute."""
    write = io.FileIO.write
    monkeypatch.setattr(
        local_files.NamedFile, "write", lambda file, data: write(file, bytes(data)[:3])
    )
    file_at(tmp_path / "claim").exchange(b"0123456789")
    assert (tmp_path / "claim").read_bytes() == b"0123456789"
