"""The terminal: names from strangers are escaped, and bars and log lines do not write over each other."""

import contextlib
import io
import logging
import os
import pty
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import termios

import pandas as pd
import pyte
import pytest

from permafrost.core.errors import printable
from tests.support.paths import ROOT
from tests.support.slow import slow

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
        assert_harmless(printed("distill", f"store.path={store}", "run=one", "student=cifar"))


def test_only_what_a_terminal_obeys_is_escaped():
    assert printable("Zürich 日本 'a b' \\n") == "Zürich 日本 'a b' \\n"
    assert printable("a\x1b\n\t\udcff\u2028") == r"a\x1b\n\t\udcff\u2028"


COLUMNS, LINES = 120, 200


def screen_of(*words):
    """Run a command on a pseudo-terminal, and return what is on its screen at the end, and every bar that was drawn."""
    driver, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (LINES, COLUMNS))
    process = subprocess.Popen(
        [sys.executable, "-m", "permafrost", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"TERM": "linux", "PYTHONUNBUFFERED": "1"},
        close_fds=True,
    )
    os.close(terminal)
    received = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(driver, 65536):
            received += part
    os.close(driver)
    assert process.wait() == 0, received.decode()
    screen = pyte.Screen(COLUMNS, LINES)
    pyte.ByteStream(screen).feed(received)
    bars = re.findall(r"(\w[^\r\n|]*): +\d+%\|[^|]*\| ([\d,]+)/([\d,]+) \[", received.decode())
    return [line.rstrip() for line in screen.display if line.strip()], bars


NETWORK = ["name=resnet8", "width=4"]
QUICK = [
    "trainer.epochs=3",
    "trainer.batch_size=8",
    "trainer.num_threads=1",
    "trainer.log_every_steps=1",
]
TEACH = [
    "teach",
    *("teacher=cifar", *(f"teacher.{word}" for word in NETWORK)),
    *(f"teaching.{word}" for word in QUICK),
]
DISTILL = ["distill", *(f"student.{word}" for word in NETWORK), *QUICK]
SWEEP = [
    "sweep",
    *(f"student.{word}" for word in NETWORK),
    *QUICK,
    "executor=serial",
    "variants={t1: [method.tau=1], t4: [method.tau=4]}",
    "seeds=[0]",
]


@pytest.mark.parametrize(
    "words", [DISTILL, slow(TEACH), slow(SWEEP)], ids=["distill", "teach", "sweep"]
)
def test_bars_count_records_and_leave_log_lines_whole(words, frozen, tmp_path):
    shutil.copytree(frozen.store.path, tmp_path / "stores" / "tiny")
    rows = frozen.store.num_records("train") // 8 * 8
    total = 3 * rows * (2 if words[0] == "sweep" else 1)

    lines, bars = screen_of(*words, f"store.path={tmp_path}/stores/tiny", "run=one")

    text = "\n".join(lines)
    assert {int(of.replace(",", "")) for _, _, of in bars} == {total}, text
    counts = [int(count.replace(",", "")) for _, count, _ in bars]
    assert counts == sorted(counts)
    assert counts[-1] == total
    times = [line for line in lines if re.search(r"\d\d:\d\d:\d\d permafrost", line)]
    assert times
    assert all(re.match(r"\d\d:\d\d:\d\d permafrost[.\w]*: ", line) for line in times), text
    assert all(len(line) <= COLUMNS for line in lines)
    assert sum("%|" in line for line in lines) == 1, text
