"""Facts about a training, which its folder keeps and which are logged before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.config.methods import KDConfig
from permafrost.config.training import TrainerOptions
from permafrost.library import augmentation
from permafrost.runs.folder import read_cost
from permafrost.store.facts import read_sheets
from permafrost.training.distill import distill_student
from permafrost.training.job import fit_batch
from tests.support.runs import distill_config


def trained(frozen, caplog, **options):
    """Return the sheets of a student, as its folder has them, and the text of the log."""
    with caplog.at_level("INFO"):
        result = distill_student(distill_config(frozen, run="facts", **options))
    return read_sheets(Path(result.student)), caplog.text


@pytest.mark.parametrize(("batch_size", "is_marked"), [(8, False), (32, True)])
def test_records_that_an_epoch_leaves_out_are_marked(frozen, caplog, batch_size, is_marked):
    trainer = replace(distill_config(frozen).trainer, epochs=1, batch_size=batch_size)

    sheets, log = trained(frozen, caplog, trainer=trainer)

    steps = sheets["student"]["steps"]
    assert steps.value == (
        f"{40 // batch_size} of {batch_size} records an epoch, 1 epoch; each leaves out {40 % batch_size} records, "
        "drawn anew"
    )
    assert steps.is_doubtful == is_marked
    assert str(sheets["student"]) in log
    assert sheets["student"]["records"].value == "40 of split train"


@pytest.mark.parametrize(
    ("ranks", "rows", "views", "pairs", "size"),
    [
        (1, 40, 1, False, 40),
        (3, 40, 1, False, 39),
        (2, 39, 2, True, 72),
        (1, 99, 1, False, 96),
        (4, 3, 1, False, 96),  # which the sampler refuses
    ],
)
def test_a_batch_has_at_most_the_records_of_the_selection(ranks, rows, views, pairs, size):
    trainer = TrainerOptions(batch_size=96, ranks=ranks)

    assert fit_batch(trainer, rows, views, pairs=pairs).batch_size == size


def test_a_small_selection_is_one_batch_and_the_options_stay_as_typed(frozen, caplog):
    trainer = replace(distill_config(frozen).trainer, epochs=2, batch_size=64)

    sheets, log = trained(frozen, caplog, trainer=trainer)

    assert sheets["student"]["steps"].value.startswith(
        "1 of 40 records an epoch, 2 epochs; each leaves out 0"
    )
    assert log.count("40 records, fewer than trainer.batch_size=64; a batch has 40") == 1
    folder = Path("runs/facts/distill")
    assert "batch_size: 64" in (folder / "config.yaml").read_text()
    assert read_cost(folder)["records"] == 80


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ((), "default"),
        (("distill", "student=cifar"), "typed"),
        (("distill", "experiment=demo"), "experiment"),
    ],
)
def test_a_network_that_was_not_typed_says_so(frozen, caplog, command, source):
    trainer = replace(distill_config(frozen).trainer, epochs=1)

    sheets, _ = trained(frozen, caplog, trainer=trainer, command=command)

    assert sheets["student"]["network"].source == source


@pytest.mark.parametrize("flips", [True, False])
def test_flips_of_classes_of_left_and_right_are_marked(frozen, caplog, monkeypatch, flips):
    twins = ("turn_left", "turn_right")
    monkeypatch.setattr("permafrost.training.training_sheet.find_mirrored", lambda classes: twins)
    trainer = replace(distill_config(frozen).trainer, epochs=1)
    augment = augmentation("pad_crop_flip" if flips else "pad_crop")

    sheets, _ = trained(frozen, caplog, trainer=trainer, augment=augment)

    assert ("'turn_left' look like 'turn_right'" in sheets["student"]["views"].warning) == flips


def test_targets_are_those_of_the_split_at_the_temperature_of_the_loss(frozen, caplog):
    trainer = replace(distill_config(frozen).trainer, epochs=1)

    sheets, _ = trained(frozen, caplog, trainer=trainer, method=KDConfig(tau=3.0))

    assert list(sheets) == ["student", "targets", "machine"]
    assert sheets["student"]["loss"].value.startswith("kd, tau 3")
    assert sheets["targets"]["entropy"].value.endswith("(mean, tau=3)")
    assert set(sheets["targets"]["accuracy"].value.split()[::2]) == {"train"}
