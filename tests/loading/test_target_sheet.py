"""Facts about targets, compared with NumPy on the values that a store returns, and the marks of doubtful ones."""

from dataclasses import replace

import numpy as np
import pytest

from permafrost.config.store import PassOptions
from permafrost.library import open_store
from permafrost.loading.target_sheet import (
    describe_empty,
    describe_guessing,
    describe_spread,
    entropy_and_peak,
    sheets_of,
    target_sheet,
)
from permafrost.store.facts import FACTS_NAME, read_sheets
from permafrost.store.reader import Store
from tests.support.stores import precompute_config
from tests.support.verbs import precompute


def opened(frozen):
    store = open_store(frozen.store.path)
    return store, store.open_pass(store.pass_folders()[0].name)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_spread_and_accuracy_are_those_of_the_stored_values(frozen, tau):
    store, teacher = opened(frozen)
    arrays = store.arrays("train", fields=("logits", "map"))
    scaled = arrays["logits"].astype(np.float64) / tau
    probs = np.exp(scaled - scaled.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)

    sheet = target_sheet(teacher, split="train", tau=tau)

    entropy = -(probs * np.log(probs)).sum(1).mean()
    assert sheet["entropy"].value.startswith(f"{entropy:.3g} of 2.3 nats")
    assert sheet["largest p"].value.startswith(f"{probs.max(1).mean():.3g} ")
    correct, labels = arrays["logits"].argmax(1) == arrays["label"], arrays["label"]
    present = np.unique(labels)
    over_classes = np.mean([correct[labels == label].mean() for label in present])
    assert sheet["accuracy"].value == (
        f"train {correct.mean():.4g} (mean over {len(present)} classes {over_classes:.4g})"
    )
    empty = np.ptp(arrays["map"].reshape(len(scaled), -1), axis=1) == 0
    assert sheet["empty maps"].value.startswith(f"{empty.mean():.1%} of {len(empty)}")
    assert sheet["logits"].value.startswith(f"{arrays['logits'].min():.4g} to ")


def test_a_pass_of_the_largest_logits_has_a_spread(frozen, tmp_path, tiny_teacher):
    config = precompute_config(
        tmp_path / "store",
        tiny_teacher,
        annotate=PassOptions(batch_size=8, logits="topk", k=9, temperatures=(1.0, 2.0)),
    )
    precompute.run(config)
    store = Store(tmp_path / "store")
    made = store.open_pass(store.pass_folders()[0].name)
    whole = target_sheet(opened(frozen)[1], tau=2.0)

    sheet = target_sheet(made, tau=2.0)

    assert float(sheet["entropy"].value.split()[0]) == pytest.approx(
        float(whole["entropy"].value.split()[0]), rel=0.01
    )
    assert sheet["accuracy"].value == whole["accuracy"].value


def test_entropy_and_peak_known_distributions():
    uniform, certain = np.log(np.full((3, 4), 0.25)), np.array([[0.0, -np.inf]])

    assert entropy_and_peak(uniform) == pytest.approx((np.log(4), 0.25))
    assert entropy_and_peak(certain) == (0, 1)


@pytest.mark.parametrize(
    ("share_of_most", "classes", "tau", "words"),
    [
        (0.92, 3, 1.0, "nearly uniform"),  # cosines without their scale
        (0.88, 3, 1.0, ""),
        (0.92, 3, 4.0, ""),
        (0.995, 3, 4.0, "nearly uniform"),
        (1e-6, 10, 1.0, "name a single class"),
        (0.05, 10, 1.0, ""),
        (1.0, 2, 1.0, ""),
    ],
)
def test_flat_and_certain_targets_are_doubtful(share_of_most, classes, tau, words):
    text = describe_spread(share_of_most * np.log(classes), classes, tau, records=50)

    assert words in text
    assert bool(text) == bool(words)


@pytest.mark.parametrize(
    ("predicted", "is_guessing"),
    [([0, 1] * 20, False), ([0, 0] * 20, True), ([0, 1, 1, 0] * 10, True), ([1, 0] * 20, True)],
)
def test_accuracy_that_guessing_has_too_is_doubtful(predicted, is_guessing):
    text = describe_guessing(np.array([0, 1] * 20), np.array(predicted))

    assert ("right for 50.0%" in text) == is_guessing
    assert bool(text) == is_guessing


def test_of_large_targets_fewer_records_are_read(frozen, monkeypatch):
    _, teacher = opened(frozen)
    monkeypatch.setattr("permafrost.loading.target_sheet._SHARD_BYTES", 1)

    sheet = target_sheet(teacher, split="train")

    assert sheet["entropy"].source == "24 of 40 records"  # 8 of each of three shards


def test_half_of_the_maps_empty_is_doubtful():
    assert "60% of the maps are empty" in describe_empty(0.6, 50)
    assert describe_empty(0.4, 50) == describe_empty(1.0, 3) == ""


def test_facts_of_a_pass_are_written_once_and_measured_without_the_file(frozen, tmp_path):
    store, teacher = opened(frozen)
    kept = read_sheets(teacher.folder)

    assert list(kept) == ["teacher", "targets", "machine"]
    assert store.facts() == sheets_of(store, teacher)
    assert store.facts()["targets"] == kept["targets"]
    assert kept["targets"]["accuracy"].source == "all records"
    assert kept["targets"]["trained on"].source == "unknown"
    config = replace(frozen.config, store=replace(frozen.config.store, path=str(tmp_path / "copy")))
    precompute.run(config)
    copy = Store(tmp_path / "copy")
    (folder,) = copy.pass_folders()
    assert folder.name == teacher.name  # facts are outside of fingerprints
    for name in (FACTS_NAME, f"teachers/{folder.name}/{FACTS_NAME}"):
        (tmp_path / "copy" / name).unlink()
    measured = sheets_of(copy, copy.open_pass(folder.name))
    assert measured["targets"]["entropy"].value == kept["targets"]["entropy"].value
    assert measured["data"]["brightness"].value == "unknown"


def test_normalization_that_nobody_named_is_marked(tmp_path, tiny_teacher, frozen):
    assumed = open_store(frozen.store.path).facts()["teacher"]["normalization"]
    assert assumed.source == "assumed"
    assert "teacher.mean= and teacher.std= were not typed" in assumed.warning
    config = precompute_config(
        tmp_path / "store", tiny_teacher, command=("precompute", "teacher.mean=[0.485,0.456,0.406]")
    )

    made = precompute.run(config)

    typed = made.facts["teacher"]["normalization"]
    assert (typed.source, typed.warning) == ("typed", "")
    assert typed.value == assumed.value == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
