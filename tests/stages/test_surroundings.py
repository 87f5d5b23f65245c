"""Names that are no text, locales, users without a name and splits without labels: what a command says of them."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from permafrost.config.data import ImageFolderDataConfig, ImageTableDataConfig
from permafrost.core.errors import ConfigError
from permafrost.core.progress import progress
from permafrost.sources.classes import find_mirrored
from permafrost.storage import object_cache
from permafrost.store.reader import Store
from permafrost.verbs.next_commands import NextCommands
from tests.support.image_sets import image_bytes, write_images
from tests.support.paths import ROOT
from tests.support.previews import preview_of
from tests.support.processes import run_program
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


@pytest.mark.parametrize("name", [b"b\xe9b\xe9", b"\xb9\xb7"])
def test_a_class_folder_of_another_encoding_is_one_sentence(tmp_path, name):
    """As archives of GBK and of CP437 leave them."""
    write_images(tmp_path / "set", "cat/0.jpg", "cat/1.jpg")
    odd = os.fsencode(tmp_path / "set") + b"/" + name
    Path(os.fsdecode(odd)).mkdir()
    Path(os.fsdecode(odd), "0.jpg").write_bytes(image_bytes(7))
    data = ImageFolderDataConfig(path=str(tmp_path / "set"))

    for command in (
        lambda: preview_of(data),
        lambda: precompute.run(precompute_config(tmp_path / "store", data=data)),
    ):
        with pytest.raises(ConfigError, match="is not UTF-8; rename the file or its folder"):
            command()


@pytest.mark.parametrize("verb", ["preview", "precompute"])
def test_a_process_of_another_locale_is_named_as_the_cause(tmp_path, verb):
    write_images(tmp_path / "set", "chèvre/0.jpg", "chèvre/1.jpg", "cat/0.jpg")
    words = ["data=image_folder", f"data.path={tmp_path / 'set'}", "executor=serial"]
    words += [f"store.path={tmp_path / 'store'}", "teacher=none"] if verb == "precompute" else []
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    run = run_program([sys.executable, "-m", f"stages.{verb}", *words], env=environment, cwd=ROOT)

    assert "Traceback" not in run.stderr
    assert run.returncode == 0 or "set LC_ALL=C.UTF-8 or PYTHONUTF8=1" in run.stderr


def test_a_user_without_a_name_and_a_home_has_a_cache(monkeypatch):
    def nameless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nameless)
    for variable in ("XDG_CACHE_HOME", object_cache.VARIABLE):
        monkeypatch.delenv(variable, raising=False)

    assert object_cache.cache_folder(None).name == f"permafrost-{os.getuid()}"


def store_of_splits(root, splits):
    """Store of a table with the given numbers of labeled and unlabeled records of each split."""
    rows = [
        (split, "cat" if n % 2 else "dog") if n < labeled else (split, "")
        for split, (labeled, unlabeled) in splits.items()
        for n in range(labeled + unlabeled)
    ]
    write_images(root, *(f"{n}.jpg" for n in range(len(rows))))
    lines = [
        "path,split,label",
        *(f"{n}.jpg,{split},{label}" for n, (split, label) in enumerate(rows)),
    ]
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    data = ImageTableDataConfig(path=str(root / "t.csv"), split="split")
    precompute.run(precompute_config(root / "store", data=data))
    return Store(root / "store")


@pytest.mark.parametrize(
    ("splits", "trained", "evaluated"),
    [
        ({"train": (4, 0), "test": (4, 0)}, None, None),
        ({"train": (4, 0), "val": (4, 0), "unlabeled_test": (0, 4)}, None, "val"),
        ({"train": (4, 0), "val": (4, 0), "test": (0, 4)}, None, "val"),
        ({"a": (4, 0), "b": (8, 0), "test": (4, 0)}, "b", None),
        ({"train": (0, 4), "test": (0, 4)}, None, None),
    ],
)
def test_the_next_commands_name_splits_that_they_can_use(tmp_path, splits, trained, evaluated):
    store = store_of_splits(tmp_path, splits)

    command = NextCommands(store, tmp_path).teach("r")

    assert ("teaching.split=" in command) == (trained is not None)
    assert trained is None or f"teaching.split={trained}" in command
    assert ("evaluate.splits" in command) == (evaluated is not None)
    assert evaluated is None or f"evaluate.splits=[{evaluated}]" in command


@pytest.mark.parametrize(
    ("classes", "mirrored"),
    [
        (("straight", "turn_left", "turn_right"), ("turn_left", "turn_right")),
        (("TurnRight", "TurnLeft"), None),  # both of them
        (("from left to right", "from right to left"), None),
        (("Links abbiegen", "Rechts abbiegen"), None),
        (("main_droite", "main_gauche"), None),
        (("左转", "右转"), None),
        (("rotate_clockwise", "rotate_counterclockwise"), None),
        (("a", "b", "c", "d"), ("b", "d")),
        (("hand-L", "hand-R"), None),
        (("p", "q"), None),
        (("left", "center"), ()),
        (("cat", "rat", "bog", "dog", "cleft"), ()),
    ],
)
def test_classes_that_a_mirror_exchanges_are_found(classes, mirrored):
    assert find_mirrored(classes) == (classes if mirrored is None else mirrored)


def test_the_next_command_flips_no_classes_of_left_and_right(tmp_path, caplog):
    caplog.set_level(logging.INFO, "permafrost.precompute")
    commands = {}
    for names in (("left", "right"), ("cat", "dog")):
        root = tmp_path / names[0]
        paths = [f"{split}/{name}/1.jpg" for split in ("train", "test") for name in names]
        for path in paths:
            (root / "set" / path).parent.mkdir(parents=True)
            (root / "set" / path).write_bytes(image_bytes(size=(80, 80)))
        data = ImageFolderDataConfig(path=str(root / "set"))
        precompute.run(precompute_config(root / "store", data=data, image_size=80))
        caplog.clear()
        commands[names] = NextCommands(Store(root / "store"), root).teach("r"), caplog.text

    (arrows, said), (animals, silent) = commands.values()
    assert "teaching.augment=pad_crop teaching.augment.size=80" in arrows
    assert "without horizontal flips, as a flip makes class 'left' look like 'right'" in said
    assert "teaching.augment=pad_crop_flip" in animals
    assert "flip" not in silent


def test_names_of_passes_are_names(frozen):
    result = precompute.run(frozen.config)

    assert result.passes == tuple(folder.name for folder in frozen.store.pass_folders())
    assert result.printed()["passes"].startswith(f"{result.passes[0]} (")
    assert NextCommands(frozen.store, Path("x")).distill(
        "r", frozen.store.open_pass(result.passes[0])
    )
    assert np.isfinite(result.bytes_per_record).all()


@pytest.mark.slow
def test_a_command_without_standard_streams_keeps_other_text_out_of_its_files(tmp_path):
    """As a daemon starts it. The next file that is opened would be number 2, to which libraries print."""
    words = ["data=demo", "data.image_size=32", "data.min_digit_size=8", "data.max_digit_size=12"]
    words += ["data.train_digits=12", "data.test_digits=6", "data.teacher_digits=6"]
    words += ["teacher=cifar", "teacher.name=resnet8", "teacher.weights=random", "executor=serial"]
    command = [sys.executable, "-m", "permafrost", "precompute", "store.path=store", *words]

    def close():
        for number in (0, 1, 2):
            os.close(number)

    process = subprocess.run(command, cwd=tmp_path, preexec_fn=close, check=False)

    assert process.returncode == 0
    assert Store(tmp_path / "store").pass_folders()
    verify = [sys.executable, "-m", "permafrost", "verify", "store.path=store"]
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True, check=False).returncode == 0


class _OnlyWrites:
    """Stream of a notebook or of a task queue, which is no file."""

    def write(self, text):
        return len(text)

    def flush(self):
        """Do nothing."""


@pytest.mark.parametrize("stream", [None, _OnlyWrites()])
def test_progress_needs_no_terminal(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)

    with progress("title", total=2, unit="epoch") as shown:
        shown.update(1)
