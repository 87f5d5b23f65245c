"""The commands of the page about data sets that grow, run one after the other."""

import re
import shlex
from itertools import product

import numpy as np
from PIL import Image

from permafrost.functions import run_verb
from permafrost.store.reader import Store
from tests.support.paths import ROOT

PAGE = ROOT / "docs/howto/growing-data.md"
SMALL = {
    "precompute": ["store.image_size=16", "teacher.input_size=16", "cluster.threads_per_actor=1"],
    "teach": [
        "teaching.trainer.epochs=1",
        "teaching.trainer.warmup_epochs=0",
        "teaching.trainer.batch_size=4",
    ],
    "distill": ["trainer.epochs=1", "trainer.warmup_epochs=0", "trainer.batch_size=4"],
}
"""Options of each verb with which its commands end in seconds."""


def add_photographs(folder, names, classes):
    for number, name in enumerate(names):
        for split, cls in product(("train", "test"), classes):
            path = folder / split / cls / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, len(cls), len(split)]).integers(
                0, 255, (16, 16, 3)
            )
            Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_the_commands_of_the_page_end_with_two_generations_and_two_students(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    add_photographs(tmp_path / "data/photos", range(8), ("cat", "dog"))
    results = {}
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            program, verb, *words = shlex.split(line)
            assert program == "permafrost"
            extra = SMALL.get(verb, [])
            if "teacher=none" in words:
                extra = ["store.image_size=16"]
            results[verb] = run_verb(verb, *words, *extra)
        add_photographs(tmp_path / "data/photos", "abc", ("cat", "dog", "bird"))
    assert Store(tmp_path / "stores/photos").num_generations == 2
    assert results["precompute"].packed_records == results["precompute"].teacher_records == 18
    names = {finding.name for finding in results["preview"].preview.findings}
    assert "new_classes" in names
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"my-teacher", "march", "april"}
