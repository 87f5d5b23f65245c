"""Table of students whose teacher's maps are by different explainers."""

from __future__ import annotations

from docs.cells import Cell, Rows, difference, spread, table
from docs.measured import runs_of
from docs.tables.e2kd import AGAINST_KD

_LABELS = {
    "kd": "KD",
    "gradcam": "e2KD, `gradcam`",
    "signed": "e2KD, `gradcam explainer.sign=signed`",
    "input_x_gradient": "e2KD, `input_x_gradient`",
    "integrated_gradients": "e2KD, `integrated_gradients explainer.steps=2`",
    "alone": "signed maps of all classes alone",
}


def explainers() -> str:
    """Accuracy of students by explainer, on CIFAR-10 with 50 images a class and on the demo's swapped photographs."""
    rows: Rows = []
    columns = (("cifar10_explainers", "accuracy"), ("demo_explainers", "accuracy_swapped"))
    for variant, label in _LABELS.items():
        cells: list[Cell] = []
        for experiment, metric in columns:
            if variant == "alone" and experiment != "demo_explainers":
                cells += [Cell("not measured"), Cell("")]
                continue
            runs, kd = runs_of(experiment, variant), runs_of(experiment, "kd")
            cells += [spread(runs, metric), difference(runs, kd, metric)]
        rows.append((label, cells))
    header = ("%, five seeds", "CIFAR-10, 50 images a class", AGAINST_KD)
    return table((*header, "demo, photographs swapped", AGAINST_KD), rows)


TABLES = (explainers,)
