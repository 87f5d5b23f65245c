"""Tables of the interpretability study: evaluators, cells, and the detectors of all variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from docs.cells import Cell, Rows, difference, single, spread, table
from docs.measured import mean_of_variants, measured_variants, results_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STUDY_VARIANTS = {
    "labels": "labels",
    "smoothed": "smoothed labels",
    "kd": "KD",
    "e2kd": "e2KD",
}


class Metric(NamedTuple):
    """Row of a table of students."""

    name: str
    label: str
    scale: float
    digits: int
    teacher: str
    best: Callable[..., float] | None = max


def _by_variant(experiment: str, metrics: Sequence[Metric], title: str) -> str:
    rows: Rows = []
    for name, label, scale, digits, teacher, best in metrics:
        runs = {variant: runs_of(experiment, variant) for variant in STUDY_VARIANTS}
        cells = [spread(runs[variant], name, scale, digits) for variant in STUDY_VARIANTS]
        if best is not None:
            wanted = best(cell.number for cell in cells)
            cells = [Cell(cell.bold) if cell.number == wanted else cell for cell in cells]
        gains = [
            difference(runs[variant], runs[baseline], name, scale, digits)
            for variant, baseline in (("kd", "labels"), ("e2kd", "kd"))
        ]
        rows.append((label, [*cells, Cell(teacher), *gains]))
    return table(
        (title, *STUDY_VARIANTS.values(), "teacher", "KD minus labels", "e2KD minus KD"), rows
    )


def cifar10_evaluators() -> str:
    """Students of CIFAR-10 with every evaluator."""
    teacher = results_of("interpretability/cifar10_evaluators")["teacher"]
    accuracy = single(teacher["accuracy"], 100, 1).text
    whole = {name: f"{value:.0f}" for name, value in teacher.items() if name != "accuracy"}
    left, similarity = "left_of_teacher", "class_similarity"
    correlation = "class similarity, correlation with the teacher's"
    units = "units of 64 that detect a concept"
    metrics = (
        Metric("accuracy", "test accuracy, %", 100, 1, accuracy),
        Metric("fss", "FSS", 1, 3, whole["fss"]),
        Metric(left, "RS, teacher only", 1, 3, whole[left], min),
        Metric(similarity, correlation, 1, 2, whole[similarity]),
        Metric("map_cosine", "cosine of maps with the teacher's", 1, 2, "1"),
        Metric("detectors", units, 1, 1, whole["detectors"], None),
    )
    return _by_variant("interpretability/cifar10_evaluators", metrics, "")


def cells() -> str:
    """Students of drawn cells."""
    teacher = {
        name: single(value, 100, 1).text
        for name, value in results_of("interpretability/cells")["teacher"].items()
    }
    recall, rate, energy = "five_band_recall", "five_band_fpr", "mask_energy"
    metrics = (
        Metric("accuracy", "test accuracy", 100, 1, teacher["accuracy"]),
        Metric(recall, "five bands: recall", 100, 1, teacher[recall]),
        Metric(rate, "five bands: false positive rate", 100, 1, teacher[rate], min),
        Metric(energy, "gradient's energy on the cell, above its area", 100, 1, teacher[energy]),
    )
    return _by_variant("interpretability/cells", metrics, "%")


VARIANTS = "interpretability/cifar10_variants"
DISTILLED_VARIANTS = {
    "scratch": "labels (scratch)",
    "label_smoothing": "smoothed labels",
    "kd_tau1": "KD, tau 1",
    "kd_tau2": "KD, tau 2",
    "kd_tau4": "KD, tau 4",
    "kd_tau8": "KD, tau 8",
    "at": "AT",
    "at_logits": "AT + logits",
    "ft": "FT",
    "ft_logits": "FT + logits",
    "crd": "CRD",
    "crd_logits": "CRD + logits",
    "sskd": "SSKD",
    "sskd_logits": "SSKD + logits",
    "kd_ls_teacher": "KD, teacher of smoothed labels, tau 2",
    "kd_ls_teacher_tau4": "KD, teacher of smoothed labels, tau 4",
}


def interpretability_variants() -> str:
    """Variants of the interpretability study, with the concepts that units detect."""
    metrics = (
        ("accuracy", 100, 1),
        ("class_similarity", 1, 2),
        ("entropy", 1, 2),
        ("gradient_cosine", 1, 2),
        ("detectors", 1, 1),
        ("color_detectors", 1, 1),
        ("concepts", 1, 1),
        ("mean_iou", 1, 4),
    )
    rows: Rows = [
        (label, [spread(runs_of(VARIANTS, variant), *metric) for metric in metrics])
        for variant, label in measured_variants(VARIANTS, DISTILLED_VARIANTS).items()
    ]
    teacher = results_of(VARIANTS)["teacher"]
    rows.append(("teacher", [single(teacher[name], scale, d) for name, scale, d in metrics]))
    header = ("", "test accuracy, %", "class similarity", "entropy", "gradient and map")
    return table((*header, "detectors of 64", "of a color", "concepts", "mean IoU"), rows)


CELLS_VARIANTS = "interpretability/cells_variants"


def cells_variants() -> str:
    """Five-band scores of the study's variants on drawn cells, and their differences from labels."""
    scores = ("five_band_recall", "five_band_fpr")
    rows: Rows = []
    for variant, label in measured_variants(CELLS_VARIANTS, DISTILLED_VARIANTS).items():
        runs = runs_of(CELLS_VARIANTS, variant)
        own = [spread(runs, name) for name in ("accuracy", *scores, "mask_energy")]
        gains = [difference(runs, runs_of(CELLS_VARIANTS, "scratch"), name) for name in scores]
        rows.append((label, [*own, *gains]))
    header = ("%", "test accuracy", "recall", "false positive rate", "gradient's energy")
    return table(
        (*header, "recall, difference from labels", "false positive rate, difference from labels"),
        rows,
    )


DETECTOR_CONTRASTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "labels minus smoothed labels": (["scratch"], ["label_smoothing"]),
    "KD at tau 2, 4 and 8 minus labels": (["kd_tau2", "kd_tau4", "kd_tau8"], ["scratch"]),
    "KD at all four tau minus labels": (
        ["kd_tau1", "kd_tau2", "kd_tau4", "kd_tau8"],
        ["scratch"],
    ),
    "KD at all four tau minus smoothed labels": (
        ["kd_tau1", "kd_tau2", "kd_tau4", "kd_tau8"],
        ["label_smoothing"],
    ),
    "features and logits minus features alone, mean of four": (
        ["at_logits", "ft_logits", "crd_logits", "sskd_logits"],
        ["at", "ft", "crd", "sskd"],
    ),
    "the same for AT": (["at_logits"], ["at"]),
    "the same for FT": (["ft_logits"], ["ft"]),
    "the same for CRD": (["crd_logits"], ["crd"]),
    "the same for SSKD": (["sskd_logits"], ["sskd"]),
    "KD from a teacher of smoothed labels minus KD, tau 2 and 4": (
        ["kd_ls_teacher", "kd_ls_teacher_tau4"],
        ["kd_tau2", "kd_tau4"],
    ),
}
"""Comparisons of the study: means over some variants less means over others."""


def interpretability_contrasts() -> str:
    """Differences in detectors between variants."""
    rows: Rows = []
    for label, sides in DETECTOR_CONTRASTS.items():
        more, less = (mean_of_variants(VARIANTS, variants, "detectors") for variants in sides)
        rows.append((label, [difference(more, less, "detectors", 1)]))
    return table(("", "difference in detectors"), rows)


TABLES = (
    cifar10_evaluators,
    cells,
    cells_variants,
    interpretability_variants,
    interpretability_contrasts,
)
