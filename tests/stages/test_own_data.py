"""Recipes of conf/experiment/own_data: their commands run on made-up photographs, from the table to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permafrost.config.verbs import build_verb_config
from permafrost.runs.mirrors import RUNS
from permafrost.store.reader import Store
from tests.support.commands import commands_in, header_of
from tests.support.composition import composed_of
from tests.support.photo_table import write_photo_table
from tests.support.verbs import precompute, report, sweep, teach

SMALL = {
    "precompute": ["store.image_size=72", "store.shard_size=24", "executor=serial"],
    "teach": [
        *(
            "teaching.augment.size=64",
            "teaching.trainer.epochs=2",
            "teaching.trainer.batch_size=12",
        ),
        "evaluate.splits=[test]",
    ],
    "sweep": [
        *(
            "augment.size=64",
            "trainer.epochs=2",
            "trainer.warmup_epochs=0",
            "trainer.batch_size=12",
        ),
        *("student.weights=null", "seeds=[0,1]", "executor=serial"),
    ],
    "report": ["augment.size=64", "report.cases=2", "report.contact_records=2"],
}
"""Sizes at which the commands of a recipe take seconds, by verb."""
STAGES = {"precompute": precompute, "teach": teach, "sweep": sweep, "report": report}


def run_commands(recipe: str, folder: Path) -> dict[str, list[dict[str, object]]]:
    """Run a recipe's commands at small size on made-up photographs, and return report.json."""
    table = write_photo_table(folder / "my photos")
    everywhere = [f"store.path={folder}/store"]
    network = ["teacher.name=resnet18", "teacher.input_size=64"]
    for verb, *typed in commands_in(header_of(recipe)):
        words = [*typed, *everywhere, *SMALL[verb]]
        if verb == "precompute":
            words.append(f"data.path={table}")
        if verb in ("precompute", "teach") and "teacher=none" not in typed:
            words += network
        if verb == "teach":
            assert composed_of(verb, *words)["teaching"]["start"] == "pretrained"
            words.append("teaching.start=null")
        config = build_verb_config(verb, composed_of(verb, *words))
        STAGES[verb].run(config, words) if verb == "sweep" else STAGES[verb].run(config)
    values: dict[str, list[dict[str, object]]] = json.loads(
        (RUNS / recipe / "report.json").read_text()
    )
    return values


@pytest.mark.slow
def test_students_of_a_plain_and_of_a_guided_teacher_are_trained_and_compared(tmp_path):
    values = run_commands("own_data/guided_teacher", tmp_path)

    store = Store(tmp_path / "store")
    assert {folder.name.split("-")[0] for folder in store.pass_folders()} == {"plain", "guided"}
    assert len(store.manifest.skipped) == 1
    assert {row["method"] for row in values["runs"]} == {
        *("labels", "kd_guided", "e2kd_plain", "e2kd_guided")
    }
    assert all(0 <= row["epg"] <= 1 and 0 <= row["iou"] <= 1 for row in values["runs"])
    assert (RUNS / "own_data/guided_teacher/teach/pareto/front.json").exists()


@pytest.mark.slow
def test_groups_of_label_and_background_are_scored_and_the_worst_one_selects(tmp_path):
    values = run_commands("own_data/worst_group", tmp_path)

    index = Store(tmp_path / "store").index
    assert set(index.values("group", range(index.num_rows))) == set(range(6))
    assert {row["method"] for row in values["runs"]} == {"labels", "kd", "e2kd"}
    assert all(row["worst_group"] <= row["accuracy"] for row in values["runs"])
    assert values["selection"]["select"] == "val.worst_group_accuracy"


@pytest.mark.slow
def test_several_labels_have_f1_and_localization_of_every_class(tmp_path):
    values = run_commands("own_data/many_labels", tmp_path)

    store = Store(tmp_path / "store")
    assert store.manifest.classes == ("boat", "house", "tree")
    assert store.open_passes()[0].explainer is not None
    for row in values["runs"]:
        assert all(0 <= row[name] <= 1 for name in ("f1", "epg", "iou"))
