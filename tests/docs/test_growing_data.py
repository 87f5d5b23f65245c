"""The commands of the page about data sets that grow, run one after the other."""

import re
import shlex
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from permafrost.functions import run_verb
from permafrost.models.saved import SavedNetwork
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


@pytest.mark.slow
def test_the_commands_of_the_page_end_with_an_exported_student_of_all_classes(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 3
    add_photographs(tmp_path / "data/photos", range(8), ("cat", "dog"))
    results = {}
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            program, verb, *words = shlex.split(line)
            assert program == "permafrost"
            extra = SMALL.get(verb, [])
            if "teacher=none" in words:
                extra = ["store.image_size=16"]
            if printed := getattr(results.get("precompute"), "next", ""):
                assert verb != "teach" or shlex.split(printed)[2:] == words
            results[verb] = run_verb(verb, *words, *extra)
            if "store.append=true" in words:
                assert results[verb].packed_records == results[verb].teacher_records == 18
        add_photographs(tmp_path / "data/photos", "abc", ("cat", "dog", "bird"))
    assert Store(tmp_path / "stores/photos").num_generations == 2
    assert results["precompute"].teacher_accuracy.keys() == {"train", "test"}  # by all classes
    assert results["precompute"].teacher_records == 50
    assert "the teacher resnet20 does not know 'bird' (6 records)" in caplog.text
    assert "the teacher of resnet20-" in caplog.text
    assert "does not know 'bird' (3 records): the student learns the other" in caplog.text
    assert "the rows of 2 known classes and 1 new ones" in caplog.text
    assert {*results["evaluate"].splits["test"]} >= {"accuracy", "agreement"}
    card = Path(results["export"].card).read_text()
    assert "3 classes" in card or "| classes | 3 |" in card, card
    names = {finding.name for finding in results["preview"].preview.findings}
    assert "new_classes" in names
    runs = ("march", "april", "may")
    known = [SavedNetwork(tmp_path / "runs" / run / "distill").describe().classes for run in runs]
    assert known == [("cat", "dog"), ("cat", "dog"), ("cat", "dog", "bird")]
    caplog.clear()
    old = run_verb(
        "evaluate", "store.path=stores/photos", "run=march", "evaluate.store=stores/photos"
    )
    assert (
        "does not know 'bird' (3 records): its accuracy on test is that on the other" in caplog.text
    )
    assert old.splits["test"]["majority_accuracy"] == 0.5
    run_verb("export", "store.path=stores/photos", "run=march")
