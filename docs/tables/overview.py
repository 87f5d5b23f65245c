"""Tables of the first pages: the main results, and the size of a store by data set."""

from __future__ import annotations

from itertools import combinations
from math import log10
from statistics import correlation, fmean
from typing import TYPE_CHECKING, NamedTuple

from docs.cells import Cell, Rows, Run, difference, single, spread, table
from docs.measured import committed_results, results_of, runs_of
from docs.tables.strong_views import TEST as STRONG
from permafrost_report.comparison import group_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

_EQUAL = "cifar10_equal_terms"
_SHOTS = "cifar10_50shots"
_TERMS = "CIFAR-10, 50 images per class"


_SOURCES = {
    "labels alone": ((_EQUAL, "labels"), (STRONG, "labels")),
    "KD, frozen, 20 B": ((_SHOTS, "kd"), (STRONG, "kd_frozen")),
    "KD, replayed, 749 B": ((STRONG, "kd_plain_v16"), (STRONG, "kd_v16")),
    "KD, live": (None, (STRONG, "kd_live")),
    "e2KD, frozen, 156 B": ((_SHOTS, "e2kd"), (STRONG, "e2kd_frozen")),
    "e2KD, replayed, 4 kB": ((STRONG, "e2kd_plain_v16"), (STRONG, "e2kd_v16")),
    "e2KD, live": (None, (STRONG, "e2kd_live")),
}
"""Experiment and variant by targets, for each recipe of views; None where nothing was measured."""


def readme_results() -> str:
    """Test accuracy by method, source of the targets and recipe of the views."""
    rows: Rows = [
        (
            label,
            [
                spread(runs_of(*variant), "accuracy") if variant else Cell("")
                for variant in variants
            ],
        )
        for label, variants in _SOURCES.items()
    ]
    return table(("targets", "shifts, flips", "with RandAugment and erasing"), rows)


SHORTCUT = {
    "KD": "kd",
    "e2KD, one map per record": "e2kd",
    "AT": "at",
    "CAT-KD": "cat_kd",
    "ReviewKD, live": "review_kd",
}
_LENGTHS = (90, 270)


def which_method_shortcut() -> str:
    """Methods on the demo's swapped photographs, after two lengths of training; a dash where a length was not run."""
    rows: Rows = []
    for label, variant in SHORTCUT.items():
        cells: list[Cell] = []
        for epochs in _LENGTHS:
            runs = _runs_after(variant, epochs)
            cells += (
                [
                    *(spread(runs, name) for name in ("accuracy_swapped", "epg", "agreement")),
                    difference(runs, _runs_after("e2kd", epochs), "accuracy_swapped"),
                ]
                if runs
                else [Cell("&ndash;")] * 4
            )
        rows.append((label, cells))
    heads = [
        head
        for epochs in _LENGTHS
        for head in (f"{epochs} epochs: swapped", "EPG", "agreement", "swapped, minus e2KD")
    ]
    return table(("with logits, %", *heads), rows)


def _runs_after(variant: str, epochs: int) -> list[Run]:
    try:
        return runs_of("demo_methods", f"{variant} epochs={epochs}")
    except KeyError:
        return []


class DataSet(NamedTuple):
    """A data set, the grid of its teacher's maps, and the mean size of its images if it was measured."""

    name: str
    records: int
    classes: int
    grid: int
    image_bytes: int | None
    source: str = ""
    views: int | None = None
    """Number of stored views, None for the image as it is."""


_SETS = (
    DataSet("CIFAR-10", 60_000, 10, 8, 1_670, "measured"),
    DataSet("CIFAR-100", 60_000, 100, 8, None),
    DataSet("Tiny ImageNet", 110_000, 200, 8, None),
    DataSet("ImageNet-1k, training", 1_281_167, 1_000, 7, 111_000, "estimated"),
    DataSet("the same, JPEG frames of 256 pixels", 1_281_167, 1_000, 7, 30_600, "estimated"),
    DataSet("the same, 16 stored views", 1_281_167, 1_000, 7, 111_000, "estimated", views=16),
    DataSet("ImageNet-21k", 14_197_122, 21_841, 7, 111_000, "estimated"),
)
_OTHER_BYTES = 290
"""Bytes per record of index, commit markers and manifests (docs/results/scale.md)."""
_VIEW_BYTES = 36
"""Bytes of the matrix of a stored view."""


def store_sizes() -> str:
    """Bytes of a store of logits and one float16 map per record, by data set."""
    rows: Rows = []
    for item in _SETS:
        logits, a_map = 2 * item.classes, 2 * item.grid**2 + 8
        fields = logits + a_map
        if item.views is not None:
            fields = item.views * (fields + _VIEW_BYTES)
        images = item.image_bytes
        whole = None if images is None else item.records * (fields + _OTHER_BYTES + images)
        cells = [
            f"{item.records:,}",
            size(logits),
            size(a_map),
            size(fields * item.records),
            "&ndash;" if images is None else f"{size(images)} ({item.source})",
            "&ndash;" if whole is None else size(whole),
        ]
        rows.append((item.name, [Cell(text) for text in cells]))
    header = ("data set", "records", "logits per view", "map per view", "the pass")
    return table((*header, "an image", "store with images"), rows)


def size(count: float) -> str:
    """Format a number of bytes with three digits and a decimal unit."""
    power = int(log10(count)) // 3
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


_GROUPS = {
    "cifar10_": "CIFAR-10, e2KD, AT, CAT-KD, ReviewKD, features",
    "ked/": "KED",
    "interpretability/": "the interpretability study",
}


def seed_correlations() -> str:
    """Mean correlation of the accuracies of two variants over the five seeds or more that both have, by experiments."""
    rows: Rows = []
    for start, label in _GROUPS.items():
        values = list(_correlations(start))
        rows.append((label, [Cell(str(len(values))), single(fmean(values))]))
    return table(("experiments of", "pairs of variants", "mean correlation over seeds"), rows)


def _correlations(start: str) -> Iterator[float]:
    for name in committed_results():
        runs = results_of(name)["runs"] if name.startswith(start) else []
        # Students of several selections of images have one seed more than once.
        variants = group_pairs(
            (run["method"], (run["seed"], run["accuracy"]))
            for run in runs
            if "accuracy" in run and "selection" not in run
        )
        for first, second in combinations(map(dict, variants.values()), 2):
            seeds = sorted(first.keys() & second.keys())
            pair = [[variant[seed] for seed in seeds] for variant in (first, second)]
            if len(seeds) > 4 and all(len(set(values)) > 1 for values in pair):
                yield correlation(*pair)


TABLES = (seed_correlations, readme_results, which_method_shortcut, store_sizes)
