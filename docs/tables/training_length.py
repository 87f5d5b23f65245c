"""Tables of comparisons at several lengths of training, and of the demo with five teachers."""

from __future__ import annotations

from decimal import Decimal
from statistics import mean
from typing import NamedTuple

from docs.cells import Cell, Rows, Run, difference, rounded, spread, table
from docs.measured import path_of, results_of, runs_of
from pipeline.report.comparison import confidence_interval


class Length(NamedTuple):
    """Two arms of committed results that were trained for a number of epochs."""

    epochs: int
    experiment: str
    candidate: str
    baseline: str

    @property
    def is_measured(self) -> bool:
        """True if the results of both arms are committed."""
        if not path_of(self.experiment).exists():
            return False
        arms = {run["method"] for run in results_of(self.experiment)["runs"]}
        return {self.candidate, self.baseline} <= arms


_DEMO = (
    Length(30, "demo", "e2kd", "kd"),
    Length(90, "demo_length", "e2kd epochs=90", "kd epochs=90"),
    Length(270, "demo_length", "e2kd epochs=270", "kd epochs=270"),
)
COMPARISONS: tuple[tuple[str, str, tuple[Length, ...]], ...] = (
    ("demo, swapped photographs: e2KD - KD", "accuracy_swapped", _DEMO),
    ("demo, EPG of the maps: e2KD - KD", "epg", _DEMO),
    (
        "CIFAR-10, 50 images a class, logits: e2KD - KD",
        "accuracy",
        (
            Length(120, "cifar10_equal_terms", "e2kd_logits", "kd_logits"),
            Length(360, "cifar10_equal_terms_length", "e2kd_logits", "kd_logits"),
        ),
    ),
    (
        "the same, AT - e2KD",
        "accuracy",
        (
            Length(120, "cifar10_equal_terms", "at_logits", "e2kd_logits"),
            Length(360, "cifar10_equal_terms_length", "at_logits", "e2kd_logits"),
        ),
    ),
    (
        "the same, CAT-KD - e2KD",
        "accuracy",
        (
            Length(120, "cifar10_equal_terms", "cat_kd_logits", "e2kd_logits"),
            Length(360, "cifar10_equal_terms_length", "cat_kd_logits", "e2kd_logits"),
        ),
    ),
    (
        "CIFAR-10, 25 images a class: KED - KD",
        "accuracy",
        (
            Length(60, "ked/cifar10_length", "ked shots=25 epochs=60", "kd shots=25 epochs=60"),
            Length(180, "ked/cifar10_length", "ked shots=25 epochs=180", "kd shots=25 epochs=180"),
        ),
    ),
    (
        "CIFAR-10, 100 images a class: KED - KD",
        "accuracy",
        (
            Length(60, "ked/cifar10_length", "ked shots=100 epochs=60", "kd shots=100 epochs=60"),
            Length(
                180, "ked/cifar10_length", "ked shots=100 epochs=180", "kd shots=100 epochs=180"
            ),
        ),
    ),
    (
        "the study, KD at tau 4 - labels",
        "accuracy",
        (
            Length(60, "interpretability/cifar10_arms", "kd_tau4", "scratch"),
            Length(180, "interpretability/cifar10_arms_length", "kd_tau4", "scratch"),
        ),
    ),
)


def training_length() -> str:
    """Differences of two arms at the epochs of the recipe and at more of them."""
    rows: Rows = []
    for label, metric, lengths in COMPARISONS:
        measured = [length for length in lengths if length.is_measured]
        for length in measured if len(measured) > 1 else []:
            pair = [runs_of(length.experiment, arm) for arm in (length.candidate, length.baseline)]
            seeds = len({run["seed"] for run in pair[0]} & {run["seed"] for run in pair[1]})
            cells = [Cell(str(length.epochs)), *(spread(runs, metric) for runs in pair)]
            rows.append((label, [*cells, difference(*pair, metric), Cell(str(seeds))]))
    return table(("", "epochs", "first", "second", "difference", "seeds"), rows)


CONVERGED = "demo_converged"


def demo_converged() -> str:
    """Students of five teachers, seed by seed, and the difference over the teachers."""
    runs = results_of(CONVERGED)["runs"]
    teachers = sorted({run["method"].partition("teacher=")[2] for run in runs} - {""})
    rows: Rows = []
    for teacher in teachers:
        kd, e2kd = (
            [run for run in runs if run["method"] == f"{arm} teacher={teacher}"]
            for arm in ("kd", "e2kd")
        )
        cells = [spread(arm, name) for arm in (kd, e2kd) for name in ("accuracy_swapped", "epg")]
        rows.append((teacher, [*cells, difference(e2kd, kd, "accuracy_swapped")]))
    arms = [[run for run in runs if run["method"].startswith(f"{arm} ")] for arm in ("kd", "e2kd")]
    cells = [spread(arm, name) for arm in arms for name in ("accuracy_swapped", "epg")]
    rows.append(("all students", [*cells, Cell(_over_teachers(runs, teachers))]))
    names = ("KD, swapped", "its EPG", "e2KD, swapped", "its EPG", "swapped, e2KD - KD")
    return table(("%", *names), rows)


def _over_teachers(runs: list[Run], teachers: list[str]) -> str:
    """Mean difference and its 95 % interval over teachers, each with the mean over its seeds as one value."""
    values = []
    for teacher in teachers:
        kd, e2kd = (
            [r["accuracy_swapped"] for r in runs if r["method"] == f"{arm} teacher={teacher}"]
            for arm in ("kd", "e2kd")
        )
        values.append(100 * (mean(e2kd) - mean(kd)))
    low, high = confidence_interval(values) or (values[0], values[0])
    texts = (f"{rounded(Decimal(str(value)), 1):+}" for value in (mean(values), low, high))
    return "{} ({} to {})".format(*texts)


TABLES = (training_length, demo_converged)
