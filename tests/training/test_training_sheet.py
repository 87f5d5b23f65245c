"""Facts about a training, its weights among them, which its folder keeps and which are logged before the first step."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from permafrost.config.augment import MixConfig
from permafrost.config.methods import KDConfig, LabelsConfig
from permafrost.config.store import StoreOptions
from permafrost.config.training import TrainerOptions
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError
from permafrost.library import augmentation
from permafrost.loading.dataset import StoreDataset
from permafrost.runs.folder import RunFolder, read_cost
from permafrost.store.facts import read_sheets
from permafrost.store.reader import Store
from permafrost.store.verification import verify_store
from permafrost.training.build import build_training
from permafrost.training.distill import StudentPlan, distill_student
from permafrost.training.job import fit_batch
from tests.support.image_sets import image_table_config, write_images, write_table
from tests.support.runs import distill_config
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


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
    assert re.findall("[a-z]+ 0", sheets["targets"]["accuracy"].value) == ["train 0", "classes 0"]


def packed(folder, weights=None, suffix="csv"):
    folder.mkdir()
    paths = [*write_images(folder, *(f"{number}.png" for number in range(6)))]
    path = folder / f"table.{suffix}"
    write_table(path, {"path": paths, "label": [*"xyxxxx"], "w": weights or [1] * 6})
    data = image_table_config(path, weight=None if weights is None else "w")
    precompute.run(precompute_config(folder / "store", data=data, image_size=32))
    return Store(folder / "store")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_of_weights_is_a_column_of_the_index(tmp_path, suffix):
    store = packed(tmp_path / "weighted", [0.5, 0, 2, 1e-3, 7, 2.5], suffix)
    plain, equal = packed(tmp_path / "plain"), packed(tmp_path / "equal", [0.1] * 6)

    stored = store.index.values("weight", np.argsort(store.index.keys(range(6))))
    assert stored.tolist() == [0.5, 0, 2, np.float32(1e-3), 7, 2.5]
    assert not list(verify_store(store.path))
    assert {*equal.manifest.index} - {*plain.manifest.index} == {"weight"}
    assert plain.manifest.fingerprint != equal.manifest.fingerprint
    assert StoreDataset(plain, range(6)).relative_weights() is None
    assert StoreDataset(equal, range(6)).relative_weights() is None
    with pytest.raises(ConfigError, match=r"6 records \(data\.weight\) are from 0\.0 to 0\.0"):
        StoreDataset(packed(tmp_path / "zero", [0] * 6), range(6)).relative_weights()


def test_a_training_has_and_names_weights_and_sampling(tmp_path, frozen):
    store = packed(tmp_path / "data", [1, 2, 3, 4, 5, 9])
    trainer = replace(distill_config(frozen).trainer, epochs=1, batch_size=2, sampling="balanced")
    path = StoreOptions(path=str(store.path))
    config = distill_config(frozen, store=path, method=LabelsConfig(), trainer=trainer)
    plan = StudentPlan(config, RunFolder("one").path / "distill", store)

    training = build_training(plan.spec(), DistributedContext())
    sheet = read_sheets(Path(distill_student(config).student))["student"]

    assert training.weights.equal(plan.spec().dataset.relative_weights())
    assert sheet["records"].value.endswith("; weights from 0.25 to 2.25 times their mean")
    assert sheet["sampling"].value == "balanced; 2 classes of 1 to 5 records, each 3 draws an epoch"
    mixed = replace(plan.spec(), augment=replace(config.augment, mix=(MixConfig(kind="mixup"),)))
    with pytest.raises(ConfigError, match=r"data\.weight: .* set augment\.mix=\[\]"):
        build_training(mixed, DistributedContext())
