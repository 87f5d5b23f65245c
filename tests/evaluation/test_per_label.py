"""Scores of each of many labels against other implementations, their intervals, and the choice of thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from sklearn.metrics import roc_auc_score as area_under_the_curve
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from permafrost.evaluation.per_label import (
    AT_HALF,
    Thresholds,
    auroc_interval,
    best_thresholds,
    binary_scores,
    label_table,
    many_label_scores,
    wilson_interval,
)
from tests.support.slow import slow

CASES = 200


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels f32 [N, K]: ties, unknown cells, and labels that no record has, or all have."""
    generator = torch.Generator().manual_seed(seed)
    records, classes = int(torch.randint(2, 60, (), generator=generator)), 1 + seed % 7
    logits = torch.randn(records, classes, generator=generator)
    if seed % 2:
        logits = (logits * 2).round() / 2
    frequency = torch.rand(classes, generator=generator)
    frequency = frequency.where(torch.rand(classes, generator=generator) > 0.3, frequency.round())
    labels = (torch.rand(records, classes, generator=generator) < frequency).float()
    unknown = torch.rand(records, classes, generator=generator) < 0.3
    return logits, labels.masked_fill(unknown, torch.nan)


@pytest.mark.parametrize("seed", [*range(40), *map(slow, range(40, CASES))])
def test_scores_per_label_are_those_of_scikit_learn_and_torchmetrics(seed):
    logits, labels = random_case(seed)
    threshold = 0.0 if seed % 3 else torch.linspace(-0.5, 0.5, logits.shape[1]).double()
    names = [str(label) for label in range(logits.shape[1])]

    table = label_table(logits, labels, Thresholds(threshold), names)

    cuts = torch.as_tensor(threshold).expand(len(names))
    for label, name in enumerate(names):
        known = ~labels[:, label].isnan()
        truth, values = labels[known, label].int(), logits[known, label]
        predicted = (values >= cuts[label]).int()
        row = table[name]
        assert (row["positives"], row["negatives"]) == (int(truth.sum()), int((1 - truth).sum()))
        assert row["unknown"] == int((~known).sum())
        for measure, theirs in (
            ("f1", f1_score), ("precision", precision_score), ("recall", recall_score),
        ):  # fmt: skip
            expected = theirs(truth, predicted, zero_division=np.nan) if len(truth) else math.nan
            assert row.get(measure, math.nan) == pytest.approx(expected, abs=1e-6, nan_ok=True)
        if truth.any():
            expected = average_precision_score(truth, values.double())
            assert row["average_precision"] == pytest.approx(expected, abs=1e-6)
            other = float(binary_average_precision(values.double().sigmoid(), truth))
            assert row["average_precision"] == pytest.approx(other, abs=1e-6)
        else:
            assert "average_precision" not in row
        if truth.any() and not truth.all():
            expected = area_under_the_curve(truth, values.double())
            assert row["auroc"] == pytest.approx(expected, abs=1e-6)
            other = float(binary_auroc(values.double().sigmoid(), truth))
            assert row["auroc"] == pytest.approx(other, abs=1e-6)
        else:
            assert "auroc" not in row


@pytest.mark.parametrize("seed", range(0, CASES, 10))
def test_micro_numbers_are_of_all_known_pairs_and_macro_ones_means_over_labels(seed):
    logits, labels = random_case(seed)
    names = [str(label) for label in range(logits.shape[1])]

    scores = many_label_scores(logits, labels)

    known = ~labels.isnan()
    truth, values = labels[known].int(), logits[known]
    predicted = (values >= 0).int()
    assert scores["f1"] == pytest.approx(f1_score(truth, predicted), abs=1e-12)
    if truth.any() and not truth.all():
        expected = area_under_the_curve(truth, values)
        assert scores["micro_auroc"] == pytest.approx(expected, abs=1e-12)
    table = label_table(logits, labels, AT_HALF, names)
    for measure in ("f1", "precision", "recall", "average_precision", "auroc"):
        defined = [row[measure] for row in table.values() if measure in row]
        mean = np.mean(defined) if defined else math.nan
        assert scores.get(f"macro_{measure}", math.nan) == pytest.approx(mean, nan_ok=True)


def test_f1_matches_hand_computation():
    logits = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 2.0], [5.0, -2.0, -3.0]])
    labels = torch.tensor([[1.0, 0, 1], [0, 1, torch.nan], [torch.nan] * 3])

    # One true positive, one false positive, two false negatives, and an unknown pair that is predicted.
    assert many_label_scores(logits, labels)["f1"] == 2 * 1 / (2 * 1 + 1 + 2)


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 1.0), (-1e-300, 0.0)])
def test_a_class_is_predicted_from_its_threshold_upwards(logit, expected):
    logits = torch.tensor([[logit, -1.0]], dtype=torch.float64)

    assert many_label_scores(logits, torch.tensor([[1.0, 0.0]]))["f1"] == expected


def test_of_nothing_there_are_no_scores():
    assert many_label_scores(torch.full((2, 3), -1.0), torch.full((2, 3), torch.nan)) == {}
    assert "f1" not in many_label_scores(torch.full((2, 3), -1.0), torch.zeros(2, 3))


def test_wilson_s_interval_is_that_of_scipy():
    for hits, trials in ((0, 5), (3, 7), (99, 100), (12, 12)):
        theirs = binomtest(hits, trials).proportion_ci(method="wilson")

        assert wilson_interval(hits / trials, trials) == pytest.approx((theirs.low, theirs.high))


@pytest.mark.parametrize("area", [0.5, 0.8, 0.95])
def test_the_interval_of_an_area_covers_it_in_about_95_of_100_draws(area):
    from scipy.stats import norm

    generator = np.random.default_rng(0)
    shift = math.sqrt(2) * norm.ppf(area)
    covered = 0
    for _ in range(400):
        logits = torch.from_numpy(
            np.concatenate([generator.normal(shift, 1, 30), generator.normal(0, 1, 50)])
        )
        truth = torch.arange(80) < 30
        low, high = auroc_interval(binary_scores(logits, truth, truth)["auroc"], 30, 50)
        covered += low <= area <= high

    assert 0.91 <= covered / 400 <= 0.99


@pytest.mark.parametrize("area", [0.0, 1.0])
def test_an_area_at_its_limit_has_an_interval_of_some_width(area):
    low, high = auroc_interval(area, 10, 10)

    assert high - low > 0.1
    assert low <= area <= high


def test_a_chosen_threshold_has_the_highest_f1_of_all():
    for seed in range(12):
        logits, labels = random_case(seed)
        chosen = best_thresholds(logits, labels)
        for label, cut in enumerate(chosen):
            known = ~labels[:, label].isnan()
            truth, values = labels[known, label], logits[known, label].double()
            if not 0 < truth.sum() < len(truth):
                assert cut == 0
                continue
            candidates = [*values.unique().tolist(), float(values.max()) + 1]
            scores = [f1_score(truth, values >= other, zero_division=0) for other in candidates]
            assert f1_score(truth, values >= cut) == pytest.approx(max(scores), abs=1e-12)
            assert cut not in values  # half way between two of them
