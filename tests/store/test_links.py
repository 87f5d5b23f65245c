"""Links in a store from a stranger: nothing outside of its folder is read, created or changed."""

import ast
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.config.store import StoreOptions
from permafrost.config.verbs import VerifyConfig
from permafrost.core.errors import FileError
from permafrost.storage import files, local_files
from permafrost.storage.lock import folder_lock
from permafrost.storage.rooted_paths import LinkError, RootedPath
from permafrost.store.deaths import ShardDeaths
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.verbs import verify
from tests.support.paths import ROOT
from tests.support.store_kinds import read_everything
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute


@pytest.fixture
def store(frozen, tmp_path):
    return shutil.copytree(frozen.store.path, tmp_path / "store")


@pytest.fixture
def outside(tmp_path):
    """Folder that a link leads to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


def link(path: Path, outside: Path, *, dangling: bool = False) -> None:
    """Replace a file or a folder by a link to an equal one outside, or to nothing."""
    target = outside / path.name
    if path.exists() and not dangling:
        shutil.move(path, target)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


def everything(folder: Path) -> dict[str, object]:
    """Content, mode and times of all that is in a folder."""
    return {
        str(path): (path.is_file() and path.read_bytes(), os.lstat(path).st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


# ---- attacks -------------------------------------------------------------------------------------

READ = (
    *("manifest.json", "index", "index/label.npy", "images", "images/train-000000.tar"),
    *("teachers", "{pass}", "{pass}/manifest.json", "{pass}/fields.zarr"),
    *("{pass}/fields.zarr/logits/zarr.json", "{pass}/fields.zarr/logits/c/1/0/0"),
    *("{pass}/commits", "{pass}/commits/train-000000.parquet"),
)
"""Files that training reads."""


def place(store: Path, name: str) -> Path:
    (teacher,) = (store / "teachers").iterdir()
    return store / name.replace("{pass}", f"teachers/{teacher.name}")


@pytest.mark.parametrize("name", READ)
def test_no_link_is_read_through_and_verify_names_it(store, outside, name, count_trials):
    path = place(store, name)
    link(path, outside)
    before = everything(outside)

    with pytest.raises(LinkError, match="allow_links=true") as error:
        read_everything(store)

    assert str(error.value).startswith(f"{path} is a symbolic link")
    assert [str(path) in problem for problem in verify_store(store)] == [True]
    with pytest.raises(verify.DamagedStoreError, match="symbolic link"):
        verify.verify_bytes(VerifyConfig(store=StoreOptions(path=str(store))))
    assert everything(outside) == before
    count_trials("a link at a place that training reads", {"refused": 1})


@pytest.mark.parametrize("name", ["manifest.json", "{pass}/manifest.json", "teachers"])
def test_a_link_to_nothing_is_no_missing_file(store, outside, name):
    path = place(store, name)
    link(path, outside, dangling=True)

    with pytest.raises(LinkError, match=str(path)):
        read_everything(store)


WRITTEN = (
    *(".lock", ".origin.json", "teachers", "commits", "images", "manifest.json"),
    *("images/train-000000.tar", "commits/train-000000.parquet", "commits/.train-000000.deaths"),
    *("{pass}", "{pass}/fields.zarr", "{pass}/commits", "{pass}/fields.zarr/logits/c"),
)
"""Files that precompute writes."""


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_is_written_through_a_link(store, outside, frozen, name, dangling, count_trials):
    path = place(store, name)
    (store / "commits/test-000000.parquet").unlink()  # something has to be written
    (place(store, "{pass}") / "commits/test-000000.parquet").unlink()
    (store / "commits/train-000000.parquet").unlink()
    if name.endswith("deaths"):
        path.write_bytes(b"1\n")
    link(path, outside, dangling=dangling)
    before = everything(outside)
    config = precompute_config(store, frozen.config.teacher)

    with pytest.raises(LinkError, match=str(path)):
        precompute.run(config)

    assert everything(outside) == before
    kind = "to nothing" if dangling else "to a file or folder"
    count_trials(f"a link {kind} at a place that precompute writes", {"refused": 1})


def test_a_count_of_deaths_and_a_lock_are_not_opened_through_a_link(tmp_path, outside):
    folder = RootedPath(tmp_path / "store")
    (tmp_path / "store/commits").mkdir(parents=True)
    (outside / "file").write_bytes(b"content")
    (tmp_path / "store/commits/.a.deaths").symlink_to(outside / "file")
    (tmp_path / "store/.lock").symlink_to(outside / "new")

    with pytest.raises(LinkError, match=r"\.a\.deaths"):
        ShardDeaths(folder, "a")
    with pytest.raises(LinkError, match=r"\.lock"), folder_lock(folder):
        pass

    assert (outside / "file").read_bytes() == b"content"
    assert not (outside / "new").exists()


@pytest.mark.parametrize("action", ["read", "write", "lock", "list", "remove"])
def test_a_folder_that_becomes_a_link_after_a_check_is_refused(
    tmp_path, outside, monkeypatch, action, count_trials
):
    """The folder is replaced at the moment at which it is opened, after every check of it has passed."""
    folder, path = tmp_path / "store/deep", RootedPath(tmp_path / "store") / "deep" / "file"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"own")
    (outside / "file").write_bytes(b"secret")
    before, swapped = everything(outside), []

    class Swapping:
        """Replacement of `os` in which another process is quick."""

        def __getattr__(self, name):
            return getattr(os, name)

        def open(self, name, *args, **options):
            if name == "deep" and not swapped:
                swapped.append(folder.rename(tmp_path / "moved"))
                folder.symlink_to(outside)
            return os.open(name, *args, **options)

    actions = {
        "read": lambda: files.file_at(path).read(),
        "write": lambda: files.file_at(path).create(),
        "lock": lambda: local_files.open_lock(path, create=True),
        "list": lambda: files.file_at(path.parent).paths(),
        "remove": lambda: files.file_at(path).remove(),
    }
    assert files.file_at(path).is_file()
    monkeypatch.setattr(local_files, "os", Swapping())

    with pytest.raises(LinkError, match="deep"):
        actions[action]()

    assert swapped
    assert everything(outside) == before
    count_trials("a folder that becomes a link between a check and its use", {"refused": 1})


def test_a_commit_ends_in_the_folder_in_which_it_began(tmp_path, outside):
    folder = tmp_path / "store/deep"
    with files.file_at(RootedPath(tmp_path / "store") / "deep" / "file").open_atomically() as file:
        file.write(b"own")
        folder.rename(tmp_path / "moved")
        folder.symlink_to(outside)

    assert list(outside.iterdir()) == []
    assert (tmp_path / "moved/file").read_bytes() == b"own"


# ---- what stays possible -------------------------------------------------------------------------


def test_the_links_of_an_own_store_may_be_allowed(store, outside, frozen):
    for name in ("images", "{pass}/fields.zarr"):
        link(place(store, name), outside)
    allowed = StoreOptions(path=str(store), allow_links=True)
    config = precompute_config(store, frozen.config.teacher)
    (outside / "images/train-000000.tar").unlink()

    done = precompute.run(replace(config, store=replace(config.store, allow_links=True)))

    assert done.packed_records == 16
    assert (outside / "images/train-000000.tar").is_file()
    assert verify.verify_bytes(VerifyConfig(store=allowed)).verified_records == 72
    opened = pickle.loads(pickle.dumps(Store(allowed.folder)))  # noqa: S301, as in a loader process
    assert opened.folder.allow_links
    assert len(opened.open_passes()[0].read_shard(opened.shards[0])["logits"]) == 12


def test_a_store_may_be_reached_through_links(store, tmp_path):
    (tmp_path / "way").symlink_to(store.parent)
    (tmp_path / "link").symlink_to(tmp_path / "way" / "store")

    assert list(verify_store(tmp_path / "link")) == []
    assert len(read_everything(tmp_path / "link")) == len(read_everything(store))


def test_a_path_does_not_leave_its_root():
    folder = RootedPath(Path("store")) / "images"

    assert str(folder / "a/./b") == "store/images/a/b"
    assert (folder / "a").below(RootedPath(Path("store"))) == "images/a"
    for name in ("..", "a/../..", "/etc/passwd", "a\0b"):
        with pytest.raises(FileError, match="leaves"):
            folder / name
    with pytest.raises(TypeError):
        os.fspath(folder)


# ---- the rule ------------------------------------------------------------------------------------

_MODULES = {"os", "io", "tempfile", "mmap", "shutil", "glob"}
_METHODS = {
    *("open", "exists", "is_file", "is_dir", "is_symlink", "stat", "lstat", "glob", "rglob"),
    *("iterdir", "walk", "mkdir", "rmdir", "unlink", "touch", "rename", "replace", "resolve"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "symlink_to", "hardlink_to"),
    *("OSFile", "memory_map", "fromfile", "tofile", "memmap", "ParquetFile", "ParquetWriter"),
}
_ALLOWED = {
    "io.BytesIO",
    "Image.open",  # of bytes, as the next ones
    "tarfile.open",
    "pq.ParquetFile",
    "pq.ParquetWriter",
}


def calls_of_files(path):
    """Iterate over calls that open, list or change files, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            module, _, method = name.rpartition(".")
            is_file_call = module.split(".")[0] in _MODULES or (method in _METHODS and module)
            is_ours = name.startswith("file_at(") or name in _ALLOWED
            if (is_file_call or name == "open") and not is_ours:
                yield f"{path.name}:{node.lineno}: {name}"


def test_no_module_of_the_store_opens_files_itself():
    found = [
        call
        for path in ROOT.glob("pipeline/permafrost/store/*.py")
        for call in calls_of_files(path)
    ]

    assert len(found) == 0, found
    assert (
        len(list(calls_of_files(ROOT / "pipeline/permafrost/storage/local_files.py"))) > 20
    )  # control


def test_a_store_is_the_same_with_and_without_links_allowed(store):
    before = tree_bytes(store)

    assert list(verify_store(RootedPath(store, allow_links=True))) == []
    assert tree_bytes(store) == before
