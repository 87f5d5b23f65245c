"""The page on the four papers with one's own images: its files and commands, from a folder to the reports."""

import json
import re
import shlex
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from permafrost.functions import run_verb
from permafrost.store.reader import Store
from tests.support.commands import lines_of
from tests.support.pages import blocks_of
from tests.support.paths import ROOT

PAGE = ROOT / "docs/papers/own-images.md"
SMALL = {
    "teach": ["teaching.trainer.epochs=1", "teaching.trainer.warmup_epochs=0"],
    "sweep": ["seeds=[0]", "trainer.epochs=1", "trainer.warmup_epochs=0"],
    "report": ["report.cases=2"],
}
"""Options of each verb with which its commands end in seconds."""
SECTIONS = {"photos": ("e2KD", "UniCAM", "The interpretability study"), "ked": ("KED",)}
"""Headings of the page whose lists name results of a run."""


def draw(name, generator):
    """Return a picture of 48 pixels with a cross, disc, ring or square, and its mask: 2 the shape, 1 around it."""
    y, x = np.mgrid[:48, :48] - generator.integers(18, 30, 2).reshape(2, 1, 1)
    radius, square = np.hypot(y, x), np.maximum(abs(y), abs(x))
    shape = {
        "cross": (np.minimum(abs(y), abs(x)) < 3) & (square < 10),
        "disc": radius < 8,
        "ring": (radius < 10) & (radius > 6),
        "square": square < 8,
    }[name]
    mask = np.where(shape, 2, radius < 13).astype(np.uint8)
    noise = generator.integers(40, 120, (48, 48, 3))
    return Image.fromarray((noise + 60 * mask[..., None]).astype(np.uint8)), Image.fromarray(mask)


def write_folder(folder, sizes):
    """Write pictures and masks, and the table that the page describes."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    generator, rows = np.random.default_rng(0), []
    for split, size in sizes.items():
        for number in range(size):
            for label in ("cross", "disc", "ring", "square"):
                paths = [f"{of}/{split}-{label}-{number}.png" for of in ("images", "masks")]
                for image, path in zip(draw(label, generator), paths, strict=True):
                    image.save(folder / path)
                rows.append([paths[0], label, split, paths[1]])
    table = pd.DataFrame(rows, columns=["path", "label", "split", "mask"])
    table.to_csv(folder / "photos.csv", index=False)


def names_of_results(heading):
    """Names of results in the list below a heading, whose items begin with them."""
    text = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^- `([\w.]+)`: ", text, re.M)


@pytest.mark.slow
def test_the_files_and_commands_of_the_page_lead_from_a_folder_to_the_tables_of_the_papers(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", {"train": 24, "test": 8})
    for block in blocks_of(PAGE, "yaml"):
        name = re.match(r"run: (\w+)\n", block.code)[1]
        Path(f"{name}.yaml").write_text(block.code)
    for line in lines_of("".join(block.code for block in blocks_of(PAGE, "bash"))):
        _, verb, *words = shlex.split(line)
        small = ["teaching.records=16"] if words == ["experiment=ked.yaml"] else []
        run_verb(verb, *words, *SMALL.get(verb, []), *(small if verb == "teach" else []))

    for run, headings in SECTIONS.items():
        (student,) = Path(f"runs/{run}/students").glob(f"{'ked' if run == 'ked' else 'e2kd'}-*")
        results = json.loads((student / "evaluate/metrics.json").read_text())["splits"]["test"]
        names = [name for heading in headings for name in names_of_results(heading)]
        assert len(names) > 2
        for name in names:
            assert reduce(getitem, name.split("."), results) is not None, name
        assert Path(f"runs/{run}/report.html").exists()
    store = Store(tmp_path / "stores/photos")
    assert {folder.name.split("-")[0] for folder in store.pass_folders()} == {"resnet20", "trunk"}
    rows = {row["variant"] for row in json.loads(Path("runs/ked/sweep.json").read_text())["runs"]}
    assert rows == {"labels", "kd", "ked", "shuffled"}
