"""Tables of the first pages: the main results, and the size of a store by data set."""

from __future__ import annotations

from math import log10
from typing import NamedTuple

from docs.cells import Cell, Rows, Run, difference, spread, table
from docs.measured import runs_of
from docs.tables.e2kd import bytes_cell
from docs.tables.strong_views import TEST as STRONG

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
    "features, logits and labels, frozen, 51 kB": (
        ("cifar10_features", "features_both_4096"),
        None,
    ),
}
"""Experiment and arm by targets, for each recipe of views; None where nothing was measured."""


def readme_results() -> str:
    """Test accuracy by method, source of the targets and recipe of the views."""
    rows: Rows = [
        (label, [spread(runs_of(*arm), "accuracy") if arm else Cell("") for arm in arms])
        for label, arms in _SOURCES.items()
    ]
    return table(("targets", "shifts, flips", "with RandAugment and erasing"), rows)


FEW_IMAGES = {
    "KD": ("kd_logits", bytes_cell()),
    "e2KD, one map per record": ("e2kd_logits", bytes_cell("one map")),
    "AT": ("at_logits", bytes_cell("attention")),
    "CAT-KD": ("cat_kd_logits", bytes_cell("class maps")),
    "e2KD, maps of all classes": ("e2kd_logits_all", bytes_cell("10 maps")),
    "ReviewKD, live, with labels": ("review_kd_both", Cell("live")),
}
_FROZEN_REVIEW = "ReviewKD, frozen, with labels"
_FROZEN_FEATURES = "`method=features`, frozen, with labels, its weight searched"


def which_method_few_images() -> str:
    """Methods on few images without a shortcut, at equal terms."""
    kd = runs_of(_EQUAL, "kd_logits")
    rows: Rows = []
    arms = {label: (runs_of(_EQUAL, arm), size) for label, (arm, size) in FEW_IMAGES.items()}
    features = bytes_cell("features")
    arms[_FROZEN_REVIEW] = runs_of("cifar10_features", "mirror"), features
    arms[_FROZEN_FEATURES] = runs_of("cifar10_features", "features_both_4096"), features
    for label, (runs, size) in arms.items():
        cells = [size, spread(runs, "accuracy"), spread(runs, "agreement"), difference(runs, kd)]
        rows.append((label, cells))
    header = ("with logits, %", "bytes per record", "accuracy", "agreement", "accuracy minus KD")
    return table(header, rows)


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
    for label, arm in SHORTCUT.items():
        cells: list[Cell] = []
        for epochs in _LENGTHS:
            runs = _runs_after(arm, epochs)
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


def _runs_after(arm: str, epochs: int) -> list[Run]:
    try:
        return runs_of("demo_methods", f"{arm} epochs={epochs}")
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
"""Bytes per record of index, receipts and manifests (docs/results/scale.md)."""
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


TABLES = (readme_results, which_method_few_images, which_method_shortcut, store_sizes)
