"""Tables of small and unequal data: fold teachers, sampling of classes, and several teachers in balance."""

from __future__ import annotations

from docs.cells import Cell, Rows, by_seed, difference, spread, table
from docs.measured import runs_of

_FOLDS = {
    "labels": "labels",
    "kd_one": "KD, a teacher that has seen the images",
    "kd_folds": "KD, five fold teachers",
    "e2kd_one": "e2KD, a teacher that has seen the images",
    "e2kd_folds": "e2KD, five fold teachers",
}
_SAMPLINGS = {"": "uniform", "_sqrt": "sqrt", "_balanced": "balanced"}
_STANDARDS = {"none": "none", "channel": "channel", "phi_s": "phi_s"}


def fold_teachers() -> str:
    """Test accuracy of students without an outside teacher, minus students of labels, and folds minus one teacher."""
    rows: Rows = []
    for experiment, data in (("cifar10_folds", "CIFAR-10"), ("demo_folds", "demo")):
        for variant, label in _FOLDS.items():
            runs = runs_of(experiment, variant)
            cells = [by_seed(runs, "accuracy"), spread(runs, "accuracy")]
            for other in ("labels", variant.replace("_folds", "_one")):
                compared = runs_of(experiment, other)
                is_same = other == variant
                cells.append(Cell("&ndash;") if is_same else difference(runs, compared, "accuracy"))
            rows.append((f"{data}: {label}", cells))
    header = ("test accuracy, %", "by seed", "mean", "minus labels")
    return table((*header, "folds minus one teacher"), rows)


def unequal_classes() -> str:
    """Accuracy on balanced test images by method and sampling, and its difference from uniform sampling."""
    rows: Rows = []
    for method, label in (("labels", "labels"), ("kd", "KD")):
        for ending, sampling in _SAMPLINGS.items():
            runs = runs_of("cifar10_unequal", f"{method}{ending}")
            cells = [by_seed(runs, "accuracy"), spread(runs, "accuracy")]
            cells.append(spread(runs, "mean_class_accuracy"))
            uniform = runs_of("cifar10_unequal", method)
            cells.append(difference(runs, uniform, "accuracy") if ending else Cell("&ndash;"))
            rows.append((f"{label}, {sampling}", cells))
    header = ("students, `trainer.sampling`", "accuracy, % by seed", "mean", "mean over classes, %")
    return table((*header, "minus uniform"), rows)


def balanced_teachers() -> str:
    """Test accuracy of students of one and two teachers by method.standardize, minus none."""
    rows: Rows = []
    for kind, label in _STANDARDS.items():
        for number, teachers in (
            ("one", "ResNet-56"),
            ("both", "ResNet-56 and EfficientNet-Lite0"),
        ):
            runs = runs_of("cifar10_balance", f"{number}_{kind}")
            plain = runs_of("cifar10_balance", f"{number}_none")
            cells = [by_seed(runs, "accuracy"), spread(runs, "accuracy")]
            is_plain = kind == "none"
            cells.append(Cell("&ndash;") if is_plain else difference(runs, plain, "accuracy"))
            rows.append((f"{teachers}, `{label}`", cells))
    header = ("teachers, `method.standardize`", "test accuracy, % by seed", "mean", "minus none")
    return table(header, rows)


TABLES = (fold_teachers, unequal_classes, balanced_teachers)
