"""Levels that docs/reference/metrics.md states: what chance has over many draws, and that it states no others."""

import re

import numpy as np
import torch

from permafrost.evaluation.metrics import (
    accuracy,
    agreement,
    energy_pointing_game,
    localization_iou,
    majority_share,
    top_k_accuracy,
    uniform_score,
)
from permafrost_papers.interpretability.class_similarity import (
    mean_predictions,
    off_diagonal_spearman,
)
from permafrost_papers.interpretability.gradient_alignment import mask_energy
from permafrost_papers.unicam.estimators import InnerProducts, feature_distances
from tests.support.paths import ROOT

K, RECORDS = 6, 60
LABELS = torch.arange(RECORDS) % K
HOT = torch.nn.functional.one_hot(LABELS, K).double()


def distance_numbers(generator):
    y = torch.randn(RECORDS, 5, generator=generator, dtype=torch.float64) + HOT[:, :5]
    x = y + torch.randn(RECORDS, 5, generator=generator, dtype=torch.float64)
    other = torch.randn(RECORDS, 5, generator=generator, dtype=torch.float64)
    features = {"x": x, "y": y, "other": other, "labels": HOT}
    table = InnerProducts.from_distances({k: feature_distances(v) for k, v in features.items()})
    independent = (
        float(table.correlation("y", "other")),
        float(table.correlation("other", "labels")),
    )
    return *independent, float(table.semi_partial("x", "y", "labels"))


def drawn_levels(seed):
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(2, RECORDS, K, generator=generator)
    fss, relevance, rs = distance_numbers(generator)
    return {
        "agreement": agreement(z, t),
        "top_k": top_k_accuracy(z, LABELS, (3,))["3"],
        "spearman": off_diagonal_spearman(*(mean_predictions(v, LABELS, 1)[1] for v in (z, t))),
        "fss": fss,
        "relevance": relevance,
        "rs": rs,
    }


LEVELS = {"agreement": 1 / K, "top_k": 3 / K, "spearman": 0, "fss": 0, "relevance": 0, "rs": 0}


STATED = {
    *("accuracy", "micro_<score>", "macro_<score>", "labels.<class>.<score>", "group_accuracy.<g>"),
    *("agreement", "top_k.accuracy.<k>", "entropy", "epg", "iou", "teacher_epg", "mask_energy"),
    *("spearman.teacher", "spearman.given", "difference.<k>", "mean", "mask_only.<k>", "unmasked"),
    *("power.top.<k>", "power.bottom.<k>", "fss.<layer>", "fss_p.<layer>", "fss_biased.<layer>"),
    *(f"{of}relevance{p}.<layer>" for of in ("", "teacher_", "baseline_") for p in ("", "_p")),
    *(f"{name}.<x>_given_<y>.<layer>" for name in ("rs", "rs_p", "pdcor")),
}
"""Metrics with a level: those above, of uniform maps, of scikit-learn, and of the tests of their evaluators."""


def test_stated_levels_are_what_chance_has_in_the_mean():
    draws = [drawn_levels(seed) for seed in range(200)]
    for name, level in LEVELS.items():
        values = np.array([draw[name] for draw in draws])
        assert abs(values.mean() - level) < 4 * values.std() / len(draws) ** 0.5, name


def test_levels_of_uniform_maps_and_of_the_most_frequent_class_are_exact():
    regions = torch.zeros(2, 4, 4, dtype=torch.bool)
    regions[0, :2], regions[1, 0, 0] = True, True
    area, uniform = torch.tensor([1 / 2, 1 / 16]), torch.ones(2, 4, 4)
    assert torch.equal(uniform_score(regions), area)
    assert torch.equal(energy_pointing_game(uniform, regions), area)
    assert torch.equal(localization_iou(uniform, regions, 0.05), area)
    assert mask_energy(torch.ones(2, 3, 4, 4), regions).abs().max() < 1e-6
    labels = torch.tensor([0, 1, 1, 1])
    constant = torch.zeros(4, 3).index_fill(1, torch.tensor([1]), 1.0)
    assert accuracy(constant, labels) == majority_share(labels) == 0.75


def test_the_page_states_no_other_levels():
    page = (ROOT / "docs/reference/metrics.md").read_text()
    rows = re.split(r"\| range \| level \|\n", page)[1:]
    cells = [re.split(r"(?<!\\)\|", line) for part in rows for line in part.splitlines()[1:]]
    stated = {
        name
        for row in cells
        if len(row) == 6 and row[4].strip()
        for name in re.findall(r"`([^`]+)`", row[1])
    }
    assert stated == STATED
