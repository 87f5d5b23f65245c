"""Tables of KED: teachers and students over grids of the number of superfeatures, of images and of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from docs.cells import Cell, Rows, Run, average, difference, spread, table, with_best
from docs.measured import measured_values, measured_variants, results_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ACCURACY = "test accuracy, %"
KD_AND_KED = {"kd": "KD", "ked": "KED"}


@dataclass(frozen=True)
class Grid:
    """Accuracies of an experiment's variants over the values of one option."""

    experiment: str
    option: str
    variants: Mapping[str, str]
    """Labels by variant."""
    single_variants: tuple[str, ...] = ()
    """Values where each is a variant of its own, <variant>_m<value>, in place of grid points."""

    @property
    def values(self) -> list[str]:
        points = measured_values(self.experiment, self.option, next(iter(self.variants)))
        return list(self.single_variants) or points

    def runs(self, variant: str, value: str) -> list[Run]:
        point = (
            f"{variant}_m{value}" if self.single_variants else f"{variant} {self.option}={value}"
        )
        return runs_of(self.experiment, point)

    def rows(self) -> Rows:
        return [
            (label, [spread(self.runs(variant, value), "accuracy") for value in self.values])
            for variant, label in (
                self.variants
                if self.single_variants
                else measured_variants(self.experiment, self.variants)
            ).items()
        ]

    def with_best(self) -> Rows:
        return with_best(self.rows(), range(len(self.values)))

    def ked_over_kd(self) -> Rows:
        """Row with the difference of KED from KD at each value."""
        pairs = [(self.runs("ked", value), self.runs("kd", value)) for value in self.values]
        return [("KED minus KD", [difference(*pair) for pair in pairs])]


# ---- teachers ------------------------------------------------------------------------------------

GROUPS = {"found": "found (Algorithm 1)", "contiguous": "contiguous blocks"}


def ked_cifar10_teachers() -> str:
    """Teachers of CIFAR-10 by the number and the groups of their superfeatures."""
    return _trade_offs("ked/cifar10_teachers", "ked/cifar10_teachers_units")


def ked_digits_teachers() -> str:
    """The same of handwritten digits."""
    return _trade_offs("ked/digits_teachers", "ked/digits_teachers_units")


def _trade_offs(of_parameters: str, of_units: str) -> str:
    """Tables of two experiments, with networks of equal parameters and of equal hidden units."""
    parts = [
        _trade_off(of_parameters, f"equal parameters, {ACCURACY}"),
        _trade_off(of_units, f"equal hidden units, {ACCURACY}"),
    ]
    return "\n".join(parts)


def _trade_off(experiment: str, title: str) -> str:
    """Accuracy of teachers over the number M of superfeatures, and its difference from M = 1."""
    random = {f"random_{draw}": f"random, draw {draw}" for draw in (0, 1, 2)}
    grid = Grid(experiment, "superfeatures", GROUPS | random)
    found = [grid.runs("found", value) for value in grid.values]
    networks = {one["method"]: one for one in results_of(experiment)["networks"]}
    parameters = [networks[f"found superfeatures={n}"]["parameters"] for n in grid.values]
    return table(
        (title, *(f"M = {value}" for value in grid.values)),
        [
            *grid.rows(),
            ("found, difference from M = 1", [difference(runs, found[0]) for runs in found]),
            ("parameters", [Cell(f"{number:,}") for number in parameters]),
        ],
    )


# ---- students ------------------------------------------------------------------------------------

IMAGE_VARIANTS = {
    "labels": "labels",
    "kd": "KD",
    "kd_chimeras": "KD + chimeras",
    "ked": "KED",
    "ked_mu1": "KED, mu = 1",
    "ked_chimeras": "KED + chimeras",
    "kd_fitnet": "KD + FitNet",
    "ked_fitnet": "KED + FitNet",
    "ked_shuffled": "KED, explanations of other records",
    "ked_noise": "KED, noise in their place",
}
COLUMN_VARIANTS = {
    "labels": "labels",
    "kd": "KD",
    "ked": "KED",
    "ked_chimeras": "KED + chimeras",
    "ked_shuffled": "KED, explanations of other rows",
    "ked_noise": "KED, noise in their place",
}


def _by_shots(experiment: str, variants: Mapping[str, str], records: str) -> str:
    grid = Grid(experiment, "shots", variants)
    header = (f"{ACCURACY} ({records} a class)", *grid.values)
    return table(header, [*grid.with_best(), *grid.ked_over_kd()])


def ked_digits() -> str:
    """Students of digits by the number of images."""
    return _by_shots("ked/digits", IMAGE_VARIANTS, "images")


def ked_cifar10() -> str:
    """Students of CIFAR-10 by the number of images."""
    return _by_shots("ked/cifar10", IMAGE_VARIANTS, "images")


def ked_wine() -> str:
    """Students of wine by the number of rows."""
    return _by_shots("ked/wine", COLUMN_VARIANTS, "rows")


def ked_breast_cancer() -> str:
    """Students of breast cancer by the number of rows."""
    return _by_shots("ked/breast_cancer", COLUMN_VARIANTS, "rows")


def _by_superfeatures(experiment: str, single_variants: tuple[str, ...] = ()) -> str:
    grid = Grid(experiment, "superfeatures", KD_AND_KED, single_variants)
    header = (f"{ACCURACY} (superfeatures)", *grid.values)
    return table(header, [*grid.rows(), *grid.ked_over_kd()])


def ked_digits_levels() -> str:
    """Students by their number of superfeatures."""
    return _by_superfeatures("ked/digits_levels")


def ked_cifar10_levels() -> str:
    """The same on CIFAR-10."""
    return _by_superfeatures("ked/cifar10_levels")


def ked_cifar10_groups() -> str:
    """Students by the groups of their superfeatures, each with a teacher of the same groups."""
    experiment = "ked/cifar10_groups"
    draws = {f"random_{draw}": f"random, draw {draw}" for draw in (0, 1)}
    found = runs_of(experiment, "ked_found")
    rows: Rows = []
    for groups, label in (GROUPS | draws).items():
        kd, ked = (runs_of(experiment, f"{variant}_{groups}") for variant in ("kd", "ked"))
        own = [spread(kd, "accuracy"), spread(ked, "accuracy"), difference(ked, kd)]
        rows.append((label, [*own, difference(found, ked)]))
    header = (ACCURACY, "KD", "KED", "KED minus KD", "KED of found groups minus KED")
    return table(header, rows)


def ked_digits_retrained() -> str:
    """Students of M superfeatures whose teacher was trained with M of them."""
    return _by_superfeatures("ked/digits_retrained", ("1", "2", "4", "8"))


def ked_digits_hint() -> str:
    """Students with a hint, by its weight."""
    variants = {"kd_fitnet": "KD + FitNet", "ked_fitnet": "KED + FitNet"}
    grid = Grid("ked/digits_hint", "shots=5 lambda_hint", variants)
    return table((f"{ACCURACY} (weight of the hint)", *grid.values), grid.rows())


def ked_digits_weights() -> str:
    """Students of digits over the weights and temperatures of the loss."""
    return _weights(
        *("ked/digits_weights", "ked/digits_weights_lambda"),
        *("ked/digits_weights_tau", "ked/digits_weights_tau_superfeatures"),
    )


def ked_cifar10_weights() -> str:
    """The same on CIFAR-10."""
    return _weights(
        *("ked/cifar10_weights", "ked/cifar10_weights_lambda"),
        *("ked/cifar10_weights_tau", "ked/cifar10_weights_tau_superfeatures"),
    )


def _weights(of_mu: str, of_lambda: str, of_tau: str, of_tau_superfeatures: str) -> str:
    """Tables of four experiments, one per option."""
    ked = {"ked": "KED"}
    grids = [
        Grid(of_mu, "mu", ked),
        Grid(of_lambda, "lambda_ked", ked),
        Grid(of_tau, "tau", KD_AND_KED),
        Grid(of_tau_superfeatures, "tau_superfeatures", ked),
    ]
    return "\n".join(table((f"`method.{g.option}`", *g.values), g.rows()) for g in grids)


def ked_cifar10_trunk() -> str:
    """KED against e2KD, with groups of cells."""
    return _against_e2kd("ked/cifar10_trunk")


def ked_cifar10_channels() -> str:
    """KED against e2KD, with groups of channels."""
    return _against_e2kd("ked/cifar10_channels")


def _against_e2kd(experiment: str) -> str:
    """Students that learn from superfeatures or from maps, and their differences from KD."""
    weights = {f"e2kd_map{weight}": f"e2KD, lambda {weight}" for weight in (5, 10, 25, 50)}
    variants = {
        "labels": "labels",
        "kd": "KD",
        "e2kd": "e2KD, lambda 1",
        **weights,
        "ked": "KED",
        "ked_mu1": "KED, mu = 1",
    }
    rows: Rows = []
    for variant, label in measured_variants(experiment, variants).items():
        runs = runs_of(experiment, variant)
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        own += [average(runs, "map_cosine", 1, 2), average(runs, "superfeature_kl", 1, 2)]
        rows.append((label, [*own, difference(runs, runs_of(experiment, "kd"))]))
    rows = with_best(with_best(rows, [0, 1, 2]), [3], min)
    header = ("", ACCURACY, "agreement, %", "cosine of the maps")
    return table(
        (*header, "KL(teacher, student) of the superfeatures", "accuracy, difference from KD"), rows
    )


TABLES = (
    ked_cifar10_teachers,
    ked_digits_teachers,
    ked_digits,
    ked_cifar10,
    ked_wine,
    ked_breast_cancer,
    ked_digits_levels,
    ked_cifar10_levels,
    ked_cifar10_groups,
    ked_digits_retrained,
    ked_digits_hint,
    ked_digits_weights,
    ked_cifar10_weights,
    ked_cifar10_trunk,
    ked_cifar10_channels,
)
