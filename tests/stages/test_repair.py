"""Repair by precompute: files that are missing, were moved or have changed."""

import errno
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.store import StoreOptions
from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import FileError
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.sources.findings import DataError
from permafrost.storage.files import file_at
from permafrost.storage.lock import LockedError, folder_lock
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.verbs import verify
from tests.support.slow import slow
from tests.support.store_kinds import EVERY_OUTPUT, build_store, read_everything, write_tars
from tests.support.stores import precompute_config, table_of_shard
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

LOST = {
    "images/train-000000.tar": 16,
    "commits/train-000000.parquet": 16,
    "index/label.npy": 0,
    "index/key_offsets.npy": 0,
    "fields.zarr/map/c/1/0/0/0/0/0": 10,  # the second shard
    "fields.zarr/map/zarr.json": 0,
    "commits/test-000000.parquet in the pass": 10,
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("how", ["gone", slow("cut")])
def test_a_published_store_gets_its_own_lost_file_back(tmp_path, frozen, lost, how):
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    config = precompute_config(store, frozen.config.teacher)
    of_pass = lost.startswith("fields") or lost.endswith("pass")
    folder = Store(store).pass_folders()[0] if of_pass else store
    path = Path(str(folder)) / lost.removesuffix(" in the pass")
    if how == "cut" and path.suffix in (".json", ".parquet"):
        pytest.skip("a truncated small file is detected by its digest and must be deleted by hand")
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:-1])

    result = precompute.run(config)

    assert result.packed_records + result.teacher_records == LOST[lost]
    assert tree_bytes(store) == tree_bytes(frozen.store.path)
    assert precompute.run(config).packed_records == 0


def test_what_killed_processes_left_is_gone_when_a_store_is_published(tmp_path, frozen):
    config = precompute_config(tmp_path / "store", frozen.config.teacher)
    precompute.run(config)
    store = tmp_path / "store"
    (store / "manifest.json").unlink()
    left = [store / "images/.a.partial", store / "commits/.train-000000.deaths"]
    for path in left:
        path.write_bytes(b"left")
    assert [str(p) for p in left if any(str(p) in problem for problem in verify_store(store))] == []

    precompute.run(config)

    assert not any(path.exists() for path in left)
    left[0].write_bytes(b"left")
    assert any("left by a process that was killed" in problem for problem in verify_store(store))


# ---- referenced tars -----------------------------------------------------------------------------


@pytest.fixture
def referenced(tmp_path, tiny_teacher):
    """Store that refers to tars in tmp_path/tars, its config and its values."""
    path = build_store("referenced tars", tmp_path, tiny_teacher)
    config = precompute_config(path, tiny_teacher, annotate=EVERY_OUTPUT, shard_size=None)
    return path, config, read_everything(path)


def moved_config(config, folder):
    data = write_tars(folder.parent / "listing")
    shutil.rmtree(folder.parent / "listing")
    return replace(config, data=replace(data, path=str(folder)))


def test_tars_that_moved_are_pointed_to_anew_and_no_teacher_is_asked(referenced, tmp_path):
    path, config, sound = referenced
    (tmp_path / "tars").rename(tmp_path / "elsewhere")

    with pytest.raises(
        ManifestError, match=r"run permafrost precompute store\.path=.* data=webdataset data\.path"
    ):
        read_everything(path)
    result = precompute.run(
        replace(moved_config(config, tmp_path / "elsewhere"), teacher=config.teacher)
    )

    assert result.teacher_records == 0
    assert all(
        (one == other).all() for one, other in zip(read_everything(path), sound, strict=True)
    )
    assert list(verify_store(path)) == []


def test_a_tar_that_does_not_move_with_the_others_is_named_and_changes_nothing(
    referenced, tmp_path
):
    path, config, _ = referenced
    moved, before = tmp_path / "elsewhere", tree_bytes(path)
    (tmp_path / "tars").rename(moved)
    *_, last = sorted(moved.glob("*.tar"))
    config = moved_config(config, moved)

    sound = last.read_bytes()
    last.write_bytes(sound[:-1024] + bytes(1024 * 3))
    with pytest.raises(StoreMismatchError, match=rf"{last} .*other bytes"):
        precompute.run(config)
    assert tree_bytes(path) == before

    last.write_bytes(sound)
    last.rename(moved / "renamed-000000.tar")
    with pytest.raises(
        StoreMismatchError, match=rf"refers to the tars '{last.name}'.* has 'renamed-000000\.tar"
    ):
        precompute.run(config)


def test_nobody_is_told_to_delete_their_own_tar(referenced, tmp_path):
    path, _, _ = referenced
    tar = tmp_path / "tars" / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)

    with pytest.raises(verify.DamagedStoreError) as error:
        verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(path))))

    (line,) = [line for line in str(error.value).split("\n") if str(tar) in line]
    assert "restore it" in line
    assert "delete it" not in line
    assert "restore a file outside the store yourself" in str(error.value)


def test_a_tar_of_other_images_in_the_same_layout_is_noticed_when_read(referenced, tmp_path):
    path, config, _ = referenced
    tar = tmp_path / "tars" / "train-000000.tar"
    store = Store(path)
    shard = next(s for s in store.manifest.shards if s.path == str(tar))
    row = table_of_shard(store, shard).slice(0, 1).to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[row["offset"] + row["size"] - 20] ^= 1
    tar.write_bytes(data)

    with pytest.raises(ManifestError, match=rf"{tar} .*record {row['key']}\) is damaged"):
        list(iter_batches(StoreDataset(store, np.arange(store.index.num_rows)), 8))
    markers = path / "commits" / f"{shard.name}.parquet"
    markers.unlink()
    with pytest.raises(
        (StoreMismatchError, DataError, ValueError), match=r"other bytes|cannot be decoded"
    ):
        precompute.run(moved_config(config, tmp_path / "tars"))


# ---- errors of the operating system --------------------------------------------------------------


def test_a_store_that_may_only_be_read_is_still_found_complete(frozen, monkeypatch):
    def refused(path, flags, *mode, real=os.open, **options):
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr("permafrost.storage.local_files.os.open", refused)

    assert precompute.run(frozen.config).teacher_records == 0


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def refused(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("permafrost.storage.lock.fcntl.flock", refused)
    caplog.set_level(logging.WARNING, "permafrost.store")

    with folder_lock(tmp_path / "store"):
        pass
    assert "make sure that no other process writes to it" in caplog.text


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_an_error_unless_there_is_no_such_thing(
    tmp_path, monkeypatch, error
):
    def refused(descriptor, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112, the path of a descriptor
            raise OSError(error, os.strerror(error))
        real(descriptor)

    monkeypatch.setattr("permafrost.storage.local_files.os.fsync", refused)

    if error == errno.EINVAL:
        file_at(tmp_path / "file").write(b"data")
        assert (tmp_path / "file").read_bytes() == b"data"
    else:
        with pytest.raises(FileError, match="cannot be written"):
            file_at(tmp_path / "file").write(b"data")


@pytest.mark.parametrize("path", ["/dev/null/store", "/proc/store", "/dev/null", f"x/{'n' * 300}"])
def test_a_folder_that_cannot_be_is_one_error(path):
    with pytest.raises(FileError, match=r"cannot be written|is not a folder|does not exist"):
        file_at(Path(path).absolute()).make_folder()


def test_a_folder_that_is_taken_away_while_a_file_is_written_is_one_error(tmp_path, monkeypatch):
    def gone(*args, real=os.replace, **options):
        shutil.rmtree(tmp_path / "store")
        real(*args, **options)

    monkeypatch.setattr("permafrost.storage.local_files.os.replace", gone)

    with pytest.raises(FileError, match="check that the folder exists"):
        file_at(tmp_path / "store" / "file").write(b"data")


# ---- preserved by a repair -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"shard_size": 1024}, marks=pytest.mark.slow),
        {"shard_size": 40, "image_size": None},
    ],
)
def test_a_repair_keeps_the_frame_and_the_places_that_passes_have_seen(
    tmp_path, tiny_teacher, options
):
    store = tmp_path / "store"
    config = precompute_config(store, tiny_teacher, image_size=8, shard_size=64)
    precompute.run(config)
    expected = tree_bytes(store)
    (store / "index" / "size.npy").unlink()
    (store / "commits" / "train-000000.parquet").unlink()

    precompute.run(precompute_config(store, **{"shard_size": 64, **options}))

    assert tree_bytes(store) == expected


def test_a_repair_that_would_change_a_sound_tar_leaves_it_alone(tmp_path, tiny_teacher):
    generator = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    data = ImageFolderDataConfig(path=str(tmp_path / "images"))
    config = precompute_config(tmp_path / "store", data=data)
    precompute.run(config)
    expected = tree_bytes(tmp_path / "store" / "images")
    (tmp_path / "store" / "commits" / "train-000000.parquet").unlink()
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)

    for _ in range(2):
        with pytest.raises(StoreMismatchError, match="would have other bytes"):
            precompute.run(config)
        assert tree_bytes(tmp_path / "store" / "images") == expected


def test_a_pass_of_another_frame_is_never_read(tmp_path, tiny_teacher):
    for name, size in (("one", 16), ("other", 8)):
        config = precompute_config(tmp_path / name, tiny_teacher, image_size=size)
        precompute.run(config)
    (folder,) = (tmp_path / "other" / "teachers").iterdir()
    shutil.copytree(folder, tmp_path / "one" / "teachers" / folder.name)

    with pytest.raises(StoreMismatchError, match="other frames"):
        Store(tmp_path / "one").open_pass(folder.name)


def test_a_lock_that_belongs_to_somebody_else_still_locks(tmp_path, monkeypatch):
    with folder_lock(tmp_path / "store"):

        def refused(path, flags, *mode, real=os.open, **options):
            if flags & os.O_RDWR:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, flags, *mode, **options)

        monkeypatch.setattr("permafrost.storage.local_files.os.open", refused)
        with pytest.raises(LockedError), folder_lock(tmp_path / "store"):
            pass
