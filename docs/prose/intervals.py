"""Intervals in sentences: each is that of a difference between two variants of committed results."""

from __future__ import annotations

import re
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import stdtrit

from docs.measured import committed_results, results_of
from docs.prose.places import place, read, without_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

PAPERS = "pipeline/permafrost_papers"
PAGES = {
    "docs/results/index.md": "cifar10",
    "docs/results/frozen-vs-replay-vs-live.md": "cifar10",
    "docs/results/cifar10-50shots.md": "cifar10|interpretability/cifar10_variants$",
    "docs/results/features.md": "cifar10|demo",
    "docs/papers/e2kd.md": "cifar10|demo",
    "docs/howto/which-method.md": "cifar10|demo",
    "docs/concepts/frozen-replay-live.md": "cifar10",
    "conf/experiment/cifar10_50shots.md": "cifar10",
    "conf/experiment/frozen_replay_live.md": "cifar10",
    "conf/experiment/frozen_features.md": "cifar10|demo|interpretability",
    f"{PAPERS}/ked/experiments/results.md": "ked",
    f"{PAPERS}/unicam/experiments/results.md": "unicam",
    f"{PAPERS}/interpretability/experiments/results.md": "interpretability",
}
"""Page by its path, with a pattern of the experiments that its sentences compare."""
OTHERS = {
    "conf/experiment/frozen_features.md": (
        "takes 1.99 (1.96 to 2.03",
        "takes 1.37 (1.35 to 1.40",
        "1.01 (0.97 to 1.02",
        "(-0.009 to 0.007",
    ),
    f"{PAPERS}/interpretability/experiments/results.md": ("(-0.3 to +6.1", "(1.1 to 11.1"),
}
"""Times of steps, a range, and two differences of means over variants, which docs.claims computes."""
NUMBER = r"[-+]?\d+\.\d+"
INTERVAL = re.compile(rf"[(,]\s*(?:95 % interval )?({NUMBER})\s+to\s+({NUMBER})")
"""In brackets, after its mean or at once. Other numbers with `to` are ranges of means."""
PER_CENT = re.compile("accuracy|agreement|epg|iou|five_band|knn|linear_probe|mask_energy")


def variants_of(experiments: str) -> list[list[dict[str, Any]]]:
    """Return the students of every variant, and of KD and e2KD over the seeds of two experiments with the same
    options."""
    variants: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in committed_results():
        if not re.match(experiments, name):
            continue
        for run in results_of(name)["runs"]:
            if "selection" not in run:
                variants.setdefault((name, run["method"]), []).append(run)
    both = [
        variants.get((name, variant), [])
        for variant in ("kd", "e2kd")
        for name in ("cifar10_50shots", "cifar10_fresh")
    ]
    return [*variants.values(), both[0] + both[1], both[2] + both[3]]


@cache
def differences(experiments: str) -> set[tuple[float, float, float]]:
    """Return every (mean, low, high) of Welch's intervals between two variants, rounded to one, two and three
    digits."""
    columns: dict[str, list[tuple[float, float, int]]] = {}
    for runs in variants_of(experiments):
        for metric in runs[0] if runs else ():
            values = [run.get(metric) for run in runs]
            if (
                metric != "seed"
                and len(values) > 1
                and all(isinstance(value, float) for value in values)
            ):
                array = np.array(values) * (100 if PER_CENT.match(metric) else 1)
                entry = array.mean(), array.var(ddof=1) / len(array), len(array) - 1
                columns.setdefault(metric, []).append(entry)
    pairs = np.array(
        [(*a, *b) for entries in columns.values() for a, b in combinations(entries, 2)]
    )
    first, a, n, second, b, m = pairs.T
    half = stdtrit((a + b) ** 2 / np.maximum(a**2 / n + b**2 / m, 1e-300), 0.975) * np.sqrt(a + b)
    middle = first - second
    rows = np.stack([middle, middle - half, middle + half], axis=1)
    rows = np.concatenate([rows, -rows[:, [0, 2, 1]]])
    rows += np.sign(rows) * 1e-9  # a 5 is rounded away from zero
    return {row for digits in (1, 2, 3) for row in map(tuple, np.round(rows, digits).tolist())}


def stray_intervals(page: str, text: str) -> Iterator[tuple[int, str]]:
    """Iterate over the lines and words of intervals in sentences that are not those of two variants.

    Two variants must have the interval, with a mean that is one of the numbers before it.
    """
    text = without_blocks(text)
    for found in INTERVAL.finditer(text):
        low, high = map(float, found.groups())
        before = re.findall(
            r"[-+]?\d+(?:\.\d+)?", text[max(0, found.start() - 200) : found.start()]
        )
        means = {sign * float(number) for number in before for sign in (1, -1)}
        if not any((mean, low, high) in differences(PAGES[page]) for mean in means):
            words = " ".join(text[max(0, found.start() - 60) : found.end()].split())
            yield text.count("\n", 0, found.start()) + 1, words


def problems() -> Iterator[str]:
    """Iterate over the stray intervals of all pages."""
    for page in PAGES:
        for line, words in stray_intervals(page, read(page)):
            if not any(known in words for known in OTHERS.get(page, ())):
                yield f"{place(page, line)} {words!r}: no two variants of {PAGES[page]} have this mean and interval"
