"""Names from strangers on the terminal: control characters in them are printed as escapes."""

import contextlib
import io
import logging
import runpy
import shutil
import tarfile

import pandas as pd
import pytest

from permafrost.core.errors import printable
from tests.support.paths import ROOT

EVIL = "\x1b[31mred\n\x07\x9b2J\u202e\rpermafrost verify: sound"
"""Colors, a bell, a cleared screen, reversed text, and a line that this program could have written."""


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """Function that runs a command in this process and returns all that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(verb, *words):
        monkeypatch.setattr("sys.argv", [verb, *words])
        monkeypatch.setattr(logging.root, "handlers", [])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "stages" / f"{verb}.py"), run_name="__main__")
        return "".join(capsys.readouterr())

    return run


def assert_harmless(text):
    """Raise AssertionError unless the name was printed, and as one line of printable characters."""
    assert "red" in text
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not any(line.startswith("permafrost verify: sound") for line in text.split("\n"))


def table_of_images(folder, suffix):
    frame = pd.DataFrame({"image": [f"{EVIL}.png"], "label": [0]})
    path = folder / f"table{suffix}"
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    return f"data=image_table data.path={path} data.image=image data.label=label".split()


def tar_of_images(folder):
    with tarfile.open(folder / "train-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in (f"{EVIL}.png", f"{EVIL}.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return ["data=webdataset", f"data.path={folder}"]


def folder_of_images(folder):
    """A class without images, which is named in the log, and a file that is no image."""
    (folder / EVIL.replace("/", "")).mkdir()
    (folder / "cat").mkdir()
    (folder / "cat" / f"{EVIL}.png").write_bytes(b"no image")
    return ["data=image_folder", f"data.path={folder}"]


SOURCES = {
    "csv": lambda folder: table_of_images(folder, ".csv"),
    "parquet": lambda folder: table_of_images(folder, ".parquet"),
    "tar": tar_of_images,
    "folder": folder_of_images,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_names_in_a_source_are_printed_as_escapes(kind, printed, tmp_path):
    (tmp_path / "data").mkdir()
    words = SOURCES[kind](tmp_path / "data")

    text = printed("precompute", *words, "store.path=s", "teacher=none", "executor=serial")

    assert "error: " in text
    assert_harmless(text)


@pytest.mark.parametrize("place", ["", "images", "teachers"])
def test_names_in_a_store_are_printed_as_escapes(place, printed, frozen, tmp_path):
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    if place == "teachers":
        (teacher,) = (store / place).iterdir()
        teacher.rename(store / place / EVIL)
    else:
        (store / place / EVIL).write_bytes(b"")

    text = printed("verify", f"store.path={store}")

    assert "1 problem(s) in" in text
    assert_harmless(text)
    if place == "teachers":
        assert_harmless(printed("distill", f"store.path={store}", "student=cifar"))


def test_only_what_a_terminal_obeys_is_escaped():
    assert printable("Zürich 日本 'a b' \\n") == "Zürich 日本 'a b' \\n"
    assert printable("a\x1b\n\t\udcff\u2028") == r"a\x1b\n\t\udcff\u2028"
