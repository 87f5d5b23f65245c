"""Tables of comparisons at several lengths of training, and of the demo with five teachers."""

from __future__ import annotations

from decimal import Decimal
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from docs.cells import Cell, Rows, Run, average, difference, rounded, spread, table
from docs.measured import path_of, results_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence


class Length(NamedTuple):
    """Two variants of committed results that were trained for a number of epochs."""

    epochs: int
    experiment: str
    candidate: str
    baseline: str

    @property
    def is_measured(self) -> bool:
        """True if the results of both variants are committed."""
        if not path_of(self.experiment).exists():
            return False
        variants = {run["method"] for run in results_of(self.experiment)["runs"]}
        return {self.candidate, self.baseline} <= variants


def _and_longer(
    epochs: int, experiments: tuple[str, str], candidate: str, baseline: str
) -> tuple[Length, Length]:
    """Two variants at the epochs of their recipe, and at three times as many in the second experiment."""
    return (
        Length(epochs, experiments[0], candidate, baseline),
        Length(3 * epochs, experiments[1], candidate, baseline),
    )


def _in_grid(
    experiment: str, epochs: Sequence[int], variants: tuple[str, str]
) -> tuple[Length, ...]:
    """Two variants of a sweep over the epochs."""
    return tuple(
        Length(n, experiment, *(f"{variant} epochs={n}" for variant in variants)) for n in epochs
    )


_DEMO = (Length(30, "demo", "e2kd", "kd"), *_in_grid("demo_length", (90, 270), ("e2kd", "kd")))
_EQUAL = ("cifar10_equal_terms", "cifar10_equal_terms_length")
_STUDY = ("interpretability/cifar10_variants", "interpretability/cifar10_variants_length")
COMPARISONS: tuple[tuple[str, str, tuple[Length, ...]], ...] = (
    ("demo, swapped photographs: e2KD minus KD", "accuracy_swapped", _DEMO),
    ("demo, EPG of the maps: e2KD minus KD", "epg", _DEMO),
    (
        "CIFAR-10, 50 images per class, logits: e2KD minus KD",
        "accuracy",
        _and_longer(120, _EQUAL, "e2kd_logits", "kd_logits"),
    ),
    ("the same, AT minus e2KD", "accuracy", _and_longer(120, _EQUAL, "at_logits", "e2kd_logits")),
    (
        "the same, CAT-KD minus e2KD",
        "accuracy",
        _and_longer(120, _EQUAL, "cat_kd_logits", "e2kd_logits"),
    ),
    *(
        (
            f"CIFAR-10, {shots} images per class: KED minus KD",
            "accuracy",
            _in_grid("ked/cifar10_length", (60, 180), (f"ked shots={shots}", f"kd shots={shots}")),
        )
        for shots in (25, 100)
    ),
    (
        "the study, KD at tau 4 minus labels",
        "accuracy",
        _and_longer(60, _STUDY, "kd_tau4", "scratch"),
    ),
)


def training_length() -> str:
    """Differences of two variants at the epochs of the recipe and at more of them."""
    rows: Rows = []
    for label, metric, lengths in COMPARISONS:
        measured = [length for length in lengths if length.is_measured]
        for length in measured if len(measured) > 1 else []:
            pair = [
                runs_of(length.experiment, variant)
                for variant in (length.candidate, length.baseline)
            ]
            seeds = len(pair[0])
            cells = [Cell(str(length.epochs)), *(spread(runs, metric) for runs in pair)]
            rows.append((label, [*cells, difference(*pair, metric), Cell(str(seeds))]))
    return table(("", "epochs", "first", "second", "difference", "seeds"), rows)


CONVERGED = "demo_converged"


def converged_means() -> dict[str, list[Run]]:
    """Means of each variant over the seeds of each teacher, with the teacher's number as their seed."""
    means: dict[str, list[Run]] = {"kd": [], "e2kd": []}
    for variant, of_teachers in means.items():
        for number, teacher in enumerate(_teachers()):
            own = runs_of(CONVERGED, f"{variant} teacher={teacher}")
            values = {m: fmean(run[m] for run in own) for m in _CONVERGED_METRICS}
            of_teachers.append({"seed": number, **values})
    return means


def _teachers() -> list[str]:
    names = {run["method"].partition("teacher=")[2] for run in results_of(CONVERGED)["runs"]}
    return sorted(names - {""})


def demo_converged() -> str:
    """Students of five teachers: means over the seeds of each teacher, and their spread over teachers."""
    rows: Rows = []
    means = converged_means()
    for number, teacher in enumerate(_teachers()):
        cells = [
            average(runs_of(CONVERGED, f"{variant} teacher={teacher}"), metric)
            for variant in means
            for metric in _CONVERGED_METRICS
        ]
        rows.append((f"students of {teacher}", [*cells, _gain(means, number)]))
    cells = [spread(of, metric) for of in means.values() for metric in _CONVERGED_METRICS]
    gain = difference(means["e2kd"], means["kd"], "accuracy_swapped", paired=True)
    rows.append(("mean, and spread over teachers", [*cells, gain]))
    names = ("KD, as in training", "swapped", "EPG", "e2KD, as in training", "swapped", "EPG")
    return table(("%", *names, "swapped, e2KD minus KD"), rows)


_CONVERGED_METRICS = ("accuracy_in_distribution", "accuracy_swapped", "epg")


def _gain(means: dict[str, list[Run]], number: int) -> Cell:
    """Difference of the variants for one teacher, over the mean of its seeds."""
    kd, e2kd = (
        Decimal(str(means[variant][number]["accuracy_swapped"])) for variant in ("kd", "e2kd")
    )
    return Cell(f"{rounded(100 * (e2kd - kd), 1):+}")


TABLES = (training_length, demo_converged)
