"""A pass of a store that cannot be read, beside a sound one: what names the sound one goes on."""

import os
import shutil
from pathlib import Path

import pytest

from permafrost.core.errors import UserError
from permafrost.store import manifest
from permafrost.store.reader import Store
from tests.support.exchange import make_photographs, run_precompute

TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.weights=random")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    photographs = make_photographs(tmp_path_factory.mktemp("passes"))
    run_precompute(photographs.store, "data=none", *TEACHER, "annotate.name=sound")
    run_precompute(
        photographs.store, "data=none", *TEACHER, "annotate.name=other", "annotate.outputs=[logits]"
    )
    return photographs


def of_manifest(change):
    def damage(folder):
        path = folder / "manifest.json"
        path.rename(folder.parent.parent / "elsewhere.json")
        change(path)

    return damage


def large(path):
    with path.open("wb") as file:
        file.truncate(2**24 + 1)


def linked(folder):
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


DAMAGES = {
    "a manifest that is a link": of_manifest(
        lambda p: p.symlink_to(p.parents[2] / "elsewhere.json")
    ),
    "a manifest that is a pipe": of_manifest(os.mkfifo),
    "a manifest that is a folder": of_manifest(Path.mkdir),
    "a manifest of 16 MiB": of_manifest(large),
    "a manifest of text": of_manifest(lambda p: p.write_text("x")),
    "a folder that is a link": linked,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_pass_that_is_not_meant_may_be_unreadable(photographs, tmp_path, damage, caplog):
    path = shutil.copytree(photographs.store, tmp_path / "store")
    damage(next((path / "teachers").glob("other-*")))

    store = Store(path)
    assert store.open_pass("sound").num_views == 1
    assert store.open_pass("sound").num_views == 1
    assert [folder.name.partition("-")[0] for folder in store.pass_folders()] == ["sound"]
    assert sum("is left out" in message for message in caplog.messages) <= 1
    with pytest.raises(UserError, match="other-"):
        store.open_pass("other")


def test_values_above_the_limit_are_refused_before_the_teacher_runs(
    photographs, tmp_path, monkeypatch
):
    path = shutil.copytree(photographs.store, tmp_path / "store")
    monkeypatch.setattr(manifest, "MAX_RECORD_BYTES", 100)

    with pytest.raises(
        UserError, match=r"cannot have values of this size: 1 views have .* more than 100"
    ):
        run_precompute(path, "data=none", *TEACHER, "annotate.outputs=[features]")


@pytest.mark.parametrize("name", ["{0} (copy)", "Copy of {0}", "{0} 2", "{0}.bak"])
def test_a_copy_of_a_pass_is_named_and_stops_nobody(photographs, tmp_path, name, caplog):
    """Folders as file managers name them."""
    path = shutil.copytree(photographs.store, tmp_path / "store")
    original = next((path / "teachers").glob("sound-*"))
    shutil.copytree(original, original.with_name(name.format(original.name)))
    for stray in (".DS_Store", "._sound", "Thumbs.db"):
        (path / "teachers" / stray).write_bytes(b"x")

    assert Store(path).open_pass("other").num_views == 1
    assert sum("is left out" in text for text in caplog.messages) <= 1
    assert all("delete the copy" in text for text in caplog.messages if "is left out" in text)
    assert {folder.name for folder in Store(path).pass_folders()} == {
        folder.name for folder in Store(photographs.store).pass_folders()
    } | ({name.format(original.name)} if name.startswith("Copy") else set())
