"""The commands of the page about other data, run one after the other."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from permafrost.functions import run_verb
from tests.support.paths import ROOT

PAGE = ROOT / "docs/howto/other-data.md"
SMALL = {
    "precompute": ["executor=serial"],
    "teach": [
        "teacher=cifar", "teacher.name=resnet8", "teaching.trainer.epochs=1",
        "teaching.trainer.warmup_epochs=0", "teaching.trainer.batch_size=4",
    ],
    "distill": [
        "student.name=resnet8", "trainer.epochs=1", "trainer.warmup_epochs=0", "trainer.batch_size=4",
    ],
}  # fmt: skip
"""Options of each verb with which its commands end in seconds."""


def write_month(folder, count, seed, splits):
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        pixels = generator.integers(0, 255, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        cells = [generator.choice(["0", "1", ""]) for _ in range(2)]
        rows.append([f"{number}.png", *cells, splits[number % len(splits)]])
    table = pd.DataFrame(rows, columns=["path", "cyst", "nodule", "split"])
    table.to_csv(folder / "table.csv", index=False)


def test_the_commands_of_the_page_evaluate_a_student_on_two_stores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_month(tmp_path / "scans/march", 60, 0, ("train", "val", ""))
    write_month(tmp_path / "scans/april", 20, 1, ("",))
    results = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            program, verb, *words = shlex.split(line)
            assert program == "permafrost"
            extra = SMALL.get(verb, [])
            results.append((verb, run_verb(verb, *words, *extra)))

    own, other = (result for verb, result in results if verb == "evaluate")
    assert {row["threshold"] for row in own.splits["test"]["labels"].values()} == {
        row["threshold"] for row in other.splits["train"]["labels"].values()
    }
    assert "agreement" in own.splits["test"]
    assert "agreement" not in other.splits["train"]
    pages = [Path(result.html) for verb, result in results if verb == "report"]
    assert pages[0].name == "report.html"
    assert pages[1].name.startswith("report-in-april-")
    assert all(page.exists() for page in pages)
