"""Facts about a training, which its folder keeps and which are logged before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest

from permafrost.config.methods import KDConfig
from permafrost.store.facts import read_sheets
from permafrost.training.distill import distill_student
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
        f"{40 // batch_size} of {batch_size} records an epoch, 1 epochs; each leaves out {40 % batch_size} records, "
        "drawn anew"
    )
    assert steps.is_doubtful == is_marked
    assert str(sheets["student"]) in log
    assert sheets["student"]["records"].value == "40 of split train"


def test_targets_are_those_of_the_split_at_the_temperature_of_the_loss(frozen, caplog):
    trainer = replace(distill_config(frozen).trainer, epochs=1)

    sheets, _ = trained(frozen, caplog, trainer=trainer, method=KDConfig(tau=3.0))

    assert list(sheets) == ["student", "targets", "machine"]
    assert sheets["student"]["loss"].value.startswith("kd, tau 3")
    assert sheets["targets"]["entropy"].value.endswith("(mean, tau=3)")
    assert set(sheets["targets"]["accuracy"].value.split()[::2]) == {"train"}
