"""Tables of the pages, from the committed results.

python -m docs.tables       fills the tables between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from docs.cells import (
    Cell,
    Rows,
    Run,
    average,
    by_seed,
    difference,
    pooled_spread,
    single,
    spread,
    table,
    with_best,
)
from docs.claims import e2kd, interpretability, ked, unicam
from docs.claims.sections import claims_of
from tests.benchmarks import busy as bench_busy
from tests.benchmarks import profiles as bench_profiles
from tests.benchmarks import scale as scale_figures
from tests.benchmarks.table import RESULTS, load, markdown, markdown_of_sides

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "conf" / "experiment"
MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def results_of(experiment: str) -> dict[str, Any]:
    """Read the committed results of an experiment."""
    values: dict[str, Any] = json.loads((EXPERIMENTS / f"{experiment}.results.json").read_text())
    return values


def runs_of(experiment: str, arm: str) -> list[Run]:
    """Runs of one arm, in the order of their seeds."""
    runs = [run for run in results_of(experiment)["runs"] if run["method"] == arm]
    if not runs:
        raise KeyError(f"{experiment} has no arm {arm}")
    return sorted(runs, key=lambda run: run["seed"])


# ---- tables --------------------------------------------------------------------------------------

AGAINST_KD = "accuracy - frozen KD"


def _difference(runs: Sequence[Run], baseline: Sequence[Run]) -> Cell:
    """Difference in accuracy with its interval, or a dash for the baseline itself."""
    if runs == baseline:
        return Cell("&ndash;")
    return difference(runs, baseline, "accuracy")


SHOTS = "cifar10_50shots"
SHOTS_ARMS = {
    "labels": "labels only",
    "kd": "frozen KD",
    "e2kd": "frozen e2KD",
    "e2kd_unaugmented": "frozen e2KD, maps not moved with the image",
    "e2kd_shuffled": "frozen e2KD, maps shuffled",
}


def cifar10_50shots() -> str:
    """Students of CIFAR-10 with 50 images a class, seed by seed."""
    rows = []
    for arm, label in SHOTS_ARMS.items():
        runs = runs_of(SHOTS, arm)
        seeds = [single(run["accuracy"], 100, 1) for run in runs]
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        rows.append((label, [*seeds, *own, _difference(runs, runs_of(SHOTS, "kd"))]))
    header = ("test accuracy, %", "seed 0", "seed 1", "seed 2", "mean", "agreement", AGAINST_KD)
    return table(header, with_best(rows, [3]))


def cifar10_50shots_short() -> str:
    """The same without the seeds."""
    rows = []
    for arm, label in SHOTS_ARMS.items():
        runs = runs_of(SHOTS, arm)
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        rows.append((label, [*own, _difference(runs, runs_of(SHOTS, "kd"))]))
    header = ("%, three seeds", "test accuracy", "agreement with the teacher", AGAINST_KD)
    return table(header, with_best(rows, [0, 1]))


def cifar10_modes() -> str:
    """Frozen, replayed and live targets with GradCAM."""
    views = {
        item["views"]: f"{item['bytes']:,.0f}"
        for item in reversed(results_of("cifar10_replay")["passes"])
    }
    # KD reads no maps, so its bytes are those of the other fields.
    arms = [
        ("frozen KD", "cifar10_live", "kd", "20"),
        ("live KD", "cifar10_live", "kd_live", ""),
        ("replayed KD, V = 16", "cifar10_replay", "kd_v16", "1,331"),
        ("frozen e2KD", "cifar10_live", "e2kd", views["1 canonical"]),
        ("replayed e2KD, V = 1", "cifar10_replay", "e2kd_v1", views["1 random"]),
        ("replayed e2KD, V = 4", "cifar10_replay", "e2kd_v4", views["4 random"]),
        ("replayed e2KD, V = 16", "cifar10_replay", "e2kd_v16", views["16 random"]),
        ("live e2KD", "cifar10_live", "e2kd_live", ""),
    ]
    rows = []
    for label, experiment, arm, size in arms:
        runs = runs_of(experiment, arm)
        seeds = [single(run["accuracy"], 100, 1) for run in runs]
        own = [spread(runs, "accuracy"), spread(runs, "agreement"), average(runs, "seconds", 1, 0)]
        frozen = runs_of("cifar10_live", arm.partition("_")[0])
        rows.append((label, [*seeds, *own, Cell(size), _difference(runs, frozen)]))
    header = ("test accuracy, %", "seed 0", "seed 1", "seed 2", "mean", "agreement")
    return table(
        (*header, "seconds a student", "bytes a record", "accuracy - frozen"),
        with_best(rows, [3]),
    )


def cifar10_bcos() -> str:
    """Frozen, replayed and live targets of B-cos networks."""
    arms = {
        "labels": "labels only",
        "kd": "frozen KD",
        "kd_live": "live KD",
        "e2kd": "frozen e2KD",
        "e2kd_v4": "replayed e2KD, V = 4",
        "e2kd_v16": "replayed e2KD, V = 16",
        "e2kd_live": "live e2KD",
        "e2kd_unaugmented": "frozen e2KD, maps not moved with the image",
        "e2kd_shuffled": "frozen e2KD, maps shuffled",
    }
    rows = []
    for arm, label in arms.items():
        runs = runs_of("cifar10_bcos", arm)
        own = [by_seed(runs, "accuracy"), spread(runs, "accuracy"), spread(runs, "agreement")]
        own += [average(runs, "map_cosine", 1, 2), average(runs, "seconds", 1, 0)]
        rows.append((label, [*own, _difference(runs, runs_of("cifar10_bcos", "kd"))]))
    header = ("test, %", "accuracy by seed", "accuracy", "agreement", "map cosine")
    return table((*header, "seconds a student", AGAINST_KD), with_best(rows, [1, 2]))


def cifar10_baselines() -> str:
    """Baselines of e2KD."""
    arms = [
        ("labels only", SHOTS, "labels"),
        ("frozen KD", SHOTS, "kd"),
        ("frozen e2KD", SHOTS, "e2kd"),
        ("frozen AT, with labels", "cifar10_baselines", "at"),
        ("frozen CAT-KD, with labels", "cifar10_baselines", "cat_kd"),
        ("ReviewKD, live, with labels, a third of the epochs", "cifar10_baselines", "review_kd"),
    ]
    rows = []
    for label, experiment, arm in arms:
        runs = runs_of(experiment, arm)
        own = [by_seed(runs, "accuracy"), spread(runs, "accuracy"), spread(runs, "agreement")]
        rows.append((label, [*own, _difference(runs, runs_of(SHOTS, "e2kd"))]))
    header = ("test accuracy, %", "by seed", "mean", "agreement", "accuracy - frozen e2KD")
    return table(header, rows)


def cifar10_datafree() -> str:
    """Students that never saw their teacher's images."""
    rows = []
    for arm, label in (("kd", "frozen KD"), ("e2kd", "frozen e2KD")):
        runs = runs_of("cifar10_datafree", arm)
        own = [by_seed(runs, "accuracy"), spread(runs, "accuracy"), spread(runs, "agreement")]
        rows.append((label, [*own, _difference(runs, runs_of("cifar10_datafree", "kd"))]))
    header = ("trained on 5,760 images of digits on photographs", "accuracy by seed")
    return table((*header, "accuracy", "agreement", AGAINST_KD), with_best(rows, [1]))


def cifar10_vit() -> str:
    """Shift curves of a ViT."""
    curves = results_of("cifar10_vit")["shift_curves"]
    rows = [
        (f"{kind}, frozen {label}", [single(value) for value in curves[arm][name][1:]])
        for name, kind in (("map", "W"), ("contribution", "contributions"))
        for arm, label in (("kd", "KD"), ("e2kd", "e2KD"))
    ]
    return table(("", *map(str, range(1, 9))), rows)


def demo_guided() -> str:
    """Guided teachers of the demo and their students."""
    teachers = results_of("demo_guided")["teachers"]
    rows: Rows = []
    for name, title, ending in (
        ("plain", "plain teacher", ""),
        ("epg", "teacher guided by energy", "_epg"),
        ("iou", "teacher guided by L1", "_iou"),
    ):
        of = teachers[name]
        names = ("epg", "iou", "accuracy", "accuracy_swapped")
        rows.append((title, [single(of[metric], 100, 1) for metric in names]))
        for arm, label in (("kd", "KD"), ("e2kd", "e2KD")):
            runs = runs_of("demo_guided", arm + ending)
            metrics = ("epg", "iou", "accuracy_in_distribution", "accuracy_swapped")
            cells = [spread(runs, metric) for metric in metrics]
            if arm == "e2kd" and ending:
                cells[0] = Cell(cells[0].bold)
            rows.append((f"its students, frozen {label}", cells))
    header = ("", "EPG", "IoU", "accuracy, as in training", "photographs swapped")
    return table(header, rows)


def measured_arms(experiment: str, arms: Mapping[str, str]) -> dict[str, str]:
    """Labels of the arms that the committed results have. New arms of a recipe await a measurement."""
    known = {run["method"].partition(" ")[0] for run in results_of(experiment)["runs"]}
    return {arm: label for arm, label in arms.items() if arm in known}


def measured_levels(experiment: str, arm: str) -> list[int]:
    """Numbers of superfeatures that the committed results have of one arm."""
    start = f"{arm} superfeatures="
    found = {run["method"].removeprefix(start) for run in results_of(experiment)["runs"]}
    return sorted(int(number) for number in found if number.isdigit())


def ked_cifar10_teachers() -> str:
    """Teachers by the groups of their superfeatures."""
    sizes = measured_levels("ked/cifar10_teachers", "found")

    def runs(arm: str, number: int) -> list[Run]:
        return runs_of("ked/cifar10_teachers", f"{arm} superfeatures={number}")

    rows: Rows = [
        (label, [spread(runs(arm, number), "accuracy") for number in sizes])
        for arm, label in (("found", "found (Algorithm 1)"), ("contiguous", "contiguous blocks"))
    ]
    rows = with_best(rows, range(len(sizes)))
    draws = [
        ", ".join(average(runs(f"random_{draw}", number), "accuracy").text for draw in (0, 1))
        for number in sizes
    ]
    rows.append(("random, two draws", [Cell(text) for text in draws]))
    return table(("test accuracy, % (M superfeatures)", *map(str, sizes)), rows)


KED_ARMS = {
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


def _by_shots(experiment: str, shots: Sequence[int], title: str, arms: dict[str, str]) -> str:
    rows: Rows = [
        (label, [spread(runs_of(experiment, f"{arm} shots={n}"), "accuracy") for n in shots])
        for arm, label in measured_arms(experiment, arms).items()
    ]
    rows = with_best(rows, range(len(shots)))
    cells = [
        difference(
            runs_of(experiment, f"ked shots={n}"), runs_of(experiment, f"kd shots={n}"), "accuracy"
        )
        for n in shots
    ]
    return table((title, *map(str, shots)), [*rows, ("KED - KD", cells)])


def ked_digits() -> str:
    """Students of digits by the number of images."""
    title = "test accuracy, % (images a class)"
    return _by_shots("ked/digits", (2, 5, 10, 25), title, KED_ARMS)


def ked_cifar10() -> str:
    """Students of CIFAR-10 by the number of images."""
    title = "test accuracy, % (images a class)"
    return _by_shots("ked/cifar10", (25, 100), title, KED_ARMS)


def ked_digits_teachers() -> str:
    """Teachers of digits by the number of superfeatures, with equal parameters and with equal units."""
    return "\n".join(
        [
            _trade_off("ked/digits_teachers", "equal parameters, test accuracy, %"),
            _trade_off("ked/digits_teachers_units", "equal hidden units, test accuracy, %"),
        ]
    )


def _trade_off(experiment: str, title: str) -> str:
    """Accuracy of teachers over the number M of superfeatures, and its difference from M = 1."""
    sizes = measured_levels(experiment, "found")
    labels = {"found": "found (Algorithm 1)", "contiguous": "contiguous blocks"}
    labels |= {f"random_{draw}": f"random, draw {draw}" for draw in (0, 1, 2)}

    def runs(arm: str, number: int) -> list[Run]:
        return runs_of(experiment, f"{arm} superfeatures={number}")

    rows: Rows = [
        (label, [spread(runs(arm, number), "accuracy") for number in sizes])
        for arm, label in labels.items()
    ]
    cells = [_difference(runs("found", n), runs("found", sizes[0])) for n in sizes]
    networks = {one["method"]: one for one in results_of(experiment)["networks"]}
    parameters = [f"{networks[f'found superfeatures={n}']['parameters']:,}" for n in sizes]
    return table(
        (title, *(f"M = {n}" for n in sizes)),
        [*rows, ("found - M = 1", cells), ("parameters", [Cell(text) for text in parameters])],
    )


def ked_digits_hint() -> str:
    """Students with a hint, by its weight."""
    weights = ("0", "0.1", "1", "10", "100")
    rows: Rows = [
        (
            label,
            [
                spread(runs_of("ked/digits_hint", f"{arm} shots=5 lambda_hint={w}"), "accuracy")
                for w in weights
            ],
        )
        for arm, label in (("kd_fitnet", "KD + FitNet"), ("ked_fitnet", "KED + FitNet"))
    ]
    return table(("test accuracy, % (weight of the hint)", *weights), rows)


def ked_digits_weights() -> str:
    """Students of digits over the weights and temperatures of the loss."""
    found = []
    for experiment, option, arms in (
        ("ked/digits_weights", "mu", {"ked": "KED"}),
        ("ked/digits_weights_lambda", "lambda_ked", {"ked": "KED"}),
        ("ked/digits_weights_tau", "tau", {"kd": "KD", "ked": "KED"}),
        ("ked/digits_weights_tau_superfeatures", "tau_superfeatures", {"ked": "KED"}),
    ):
        values = list(
            dict.fromkeys(
                run["method"].partition(f"{option}=")[2]
                for run in results_of(experiment)["runs"]
                if f" {option}=" in run["method"]
            )
        )
        rows: Rows = [
            (
                label,
                [
                    spread(runs_of(experiment, f"{arm} {option}={value}"), "accuracy")
                    for value in values
                ],
            )
            for arm, label in arms.items()
        ]
        found.append(table((f"`method.{option}`", *values), rows))
    return "\n".join(found)


def ked_digits_retrained() -> str:
    """Students of M superfeatures whose teacher was trained with M of them."""
    experiment, sizes = "ked/digits_retrained", (1, 2, 4, 8)

    def runs(arm: str, number: int) -> list[Run]:
        return runs_of(experiment, f"{arm} superfeatures={number}")

    rows: Rows = [
        (label, [spread(runs(arm, number), "accuracy") for number in sizes])
        for arm, label in (("kd", "KD"), ("ked", "KED"))
    ]
    cells = [_difference(runs("ked", number), runs("kd", number)) for number in sizes]
    header = ("test accuracy, % (superfeatures)", *map(str, sizes))
    return table(header, [*rows, ("KED - KD", cells)])


def ked_digits_levels() -> str:
    """Students by their number of superfeatures."""
    sizes = measured_levels("ked/digits_levels", "kd")
    rows: Rows = [
        (
            label,
            [
                spread(runs_of("ked/digits_levels", f"{arm} superfeatures={n}"), "accuracy")
                for n in sizes
            ],
        )
        for arm, label in (("kd", "KD"), ("ked", "KED"))
    ]
    cells = [
        difference(
            runs_of("ked/digits_levels", f"ked superfeatures={n}"),
            runs_of("ked/digits_levels", f"kd superfeatures={n}"),
            "accuracy",
        )
        for n in sizes
    ]
    header = ("test accuracy, % (superfeatures)", *map(str, sizes))
    return table(header, [*rows, ("KED - KD", cells)])


def ked_cifar10_trunk() -> str:
    """KED against e2KD."""
    arms = {
        "labels": "labels",
        "kd": "KD",
        "e2kd": "e2KD, lambda 1",
        "e2kd_map5": "e2KD, lambda 5",
        "e2kd_map10": "e2KD, lambda 10",
        "e2kd_map25": "e2KD, lambda 25",
        "e2kd_map50": "e2KD, lambda 50",
        "ked": "KED",
        "ked_mu1": "KED, mu = 1",
    }
    rows: Rows = []
    for arm, label in measured_arms("ked/cifar10_trunk", arms).items():
        runs = runs_of("ked/cifar10_trunk", arm)
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        own += [average(runs, "map_cosine", 1, 2), average(runs, "superfeature_kl", 1, 2)]
        rows.append((label, [*own, _difference(runs, runs_of("ked/cifar10_trunk", "kd"))]))
    rows = with_best(with_best(rows, [0, 1, 2]), [3], min)
    header = ("", "test accuracy, %", "agreement, %", "cosine of the maps")
    return table((*header, "KL of the superfeatures", "accuracy - KD"), rows)


COLUMN_ARMS = {
    "labels": "labels",
    "kd": "KD",
    "ked": "KED",
    "ked_chimeras": "KED + chimeras",
    "ked_shuffled": "KED, explanations of other rows",
    "ked_noise": "KED, noise in their place",
}


def ked_wine() -> str:
    """Students of wine by the number of rows."""
    return _by_shots("ked/wine", (2, 5, 10), "test accuracy, % (rows a class)", COLUMN_ARMS)


def ked_breast_cancer() -> str:
    """Students of breast cancer by the number of rows."""
    return _by_shots("ked/breast_cancer", (5, 20), "test accuracy, % (rows a class)", COLUMN_ARMS)


STUDY_ARMS = {
    "labels": "labels",
    "smoothed": "smoothed labels",
    "kd": "KD",
    "e2kd": "e2KD",
}


def _by_arm(experiment: str, metrics: Sequence[tuple[Any, ...]], title: str) -> str:
    """Table with one row per metric: (name, label, scale, digits, best, teacher's text)."""
    rows: Rows = []
    for name, label, scale, digits, best, teacher in metrics:
        cells = [spread(runs_of(experiment, arm), name, scale, digits) for arm in STUDY_ARMS]
        if best is not None:
            wanted = best(cell.number for cell in cells)
            cells = [Cell(cell.bold) if cell.number == wanted else cell for cell in cells]
        gain = difference(
            *(runs_of(experiment, arm) for arm in ("e2kd", "kd")), name, scale, digits
        )
        rows.append((label, [*cells, Cell(teacher), gain]))
    return table((title, *STUDY_ARMS.values(), "teacher", "e2KD - KD"), rows)


def cifar10_evaluators() -> str:
    """Students of CIFAR-10 with every evaluator."""
    of = results_of("cifar10_evaluators")["teacher"]
    metrics = (
        ("accuracy", "test accuracy, %", 100, 1, max, single(of["accuracy"], 100, 1).text),
        ("fss", "FSS", 1, 3, max, f"{of['fss']:.0f}"),
        ("left_of_teacher", "RS, left of the teacher", 1, 3, min, f"{of['left_of_teacher']:.0f}"),
        (
            "class_similarity",
            "class similarity, correlation with the teacher's",
            *(1, 2, max),
            f"{of['class_similarity']:.0f}",
        ),
        ("map_cosine", "cosine of maps with the teacher's", 1, 2, max, "1"),
        (
            "detectors",
            "units of 64 that detect a concept",
            *(1, 1, None),
            f"{of['detectors']:.0f}",
        ),
    )
    return _by_arm("cifar10_evaluators", metrics, "")


UNICAM = "unicam/cifar10_small"
UNICAM_ARMS = {
    "labels": "labels",
    "vanilla": "logits (vanilla KD)",
    "feature": "features (factor transfer)",
    "attention": "attention (AT)",
    "other_seed": "labels, against labels of another seed",
}
UNICAM_COMPARED = [arm for arm in UNICAM_ARMS if arm != "labels"]
"""Students that are compared with a baseline."""


def unicam_students() -> str:
    """Students of CIFAR-10 by what they learned from, at depth 1."""
    rows: Rows = []
    for arm, label in UNICAM_ARMS.items():
        if arm == "other_seed":
            continue
        runs = runs_of(UNICAM, arm)
        cells = [spread(runs, "accuracy"), spread(runs, "agreement")]
        cells += [
            spread(runs, f"{name}_depth1", 1, 2)
            for name in ("fss", "relevance", "residual", "beyond_teacher")
        ]
        rows.append((label, cells))
    header = ("", "test accuracy, %", "agreement, %", "FSS", "relevance")
    return table((*header, "RS, only in the teacher", "RS, beyond the teacher"), rows)


def _by_depth(names: Mapping[str, str], arms: Sequence[str], depths: Sequence[str]) -> str:
    rows: Rows = [
        (
            f"{title}: {UNICAM_ARMS[arm]}",
            [spread(runs_of(UNICAM, arm), f"{name}_{depth}", 1, 2) for depth in depths],
        )
        for name, title in names.items()
        for arm in arms
    ]
    return table(("", *(depth.replace("depth", "depth ") for depth in depths)), rows)


DEPTHS = [f"depth{depth}" for depth in range(1, 6)]


def unicam_depths() -> str:
    """FSS and RS through five depths."""
    parts = [
        _by_depth({"fss": "FSS"}, [arm for arm in UNICAM_ARMS if arm != "other_seed"], DEPTHS),
        _by_depth({"distilled": "distilled", "lost": "lost"}, UNICAM_COMPARED, DEPTHS),
    ]
    return "\n".join(parts)


def unicam_maps() -> str:
    """Cosine of the maps between two banks, through five depths and for their mean."""
    names = {"map_distilled": "distilled", "map_residual": "residual"}
    return _by_depth(names, UNICAM_COMPARED, [*DEPTHS, "mean"])


def cells() -> str:
    """Students of drawn cells."""
    of = results_of("cells")["teacher"]

    def teacher(name: str) -> str:
        return single(of[name], 100, 1).text

    label = "gradient's energy on the cell, above its area"
    metrics = (
        ("accuracy", "test accuracy", 100, 1, max, teacher("accuracy")),
        ("five_band_recall", "five bands: recall", 100, 1, max, teacher("five_band_recall")),
        ("five_band_fpr", "five bands: false positive rate", 100, 1, min, teacher("five_band_fpr")),
        ("mask_energy", label, 100, 1, max, teacher("mask_energy")),
    )
    return _by_arm("cells", metrics, "%")


DISTILLED_ARMS = {
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


def interpretability_arms() -> str:
    """Arms of the interpretability study with the concepts that units detect, and the spread within an arm."""
    experiment = "interpretability/cifar10_arms"
    metrics = (
        ("accuracy", 100, 1),
        ("class_similarity", 1, 2),
        ("entropy", 1, 2),
        ("gradient_cosine", 1, 2),
        ("detectors", 1, 1),
        ("concepts", 1, 1),
        ("mean_iou", 1, 4),
    )
    by_arm = [
        (label, runs_of(experiment, arm))
        for arm, label in measured_arms(experiment, DISTILLED_ARMS).items()
    ]
    rows: Rows = [(label, [spread(runs, *metric) for metric in metrics]) for label, runs in by_arm]
    teacher = results_of(experiment)["teacher"]
    rows.append(("teacher", [single(teacher[name], scale, d) for name, scale, d in metrics]))
    pooled = [pooled_spread([runs for _, runs in by_arm], *metric) for metric in metrics]
    rows.append(("standard deviation within an arm", pooled))
    header = ("", "test accuracy, %", "class similarity", "entropy", "gradient and map")
    return table((*header, "detectors of 64", "concepts", "mean IoU"), rows)


DETECTOR_CONTRASTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "labels - smoothed labels": (["scratch"], ["label_smoothing"]),
    "KD at tau 2, 4 and 8 - labels": (["kd_tau2", "kd_tau4", "kd_tau8"], ["scratch"]),
    "KD at all four tau - labels": (
        ["kd_tau1", "kd_tau2", "kd_tau4", "kd_tau8"],
        ["scratch"],
    ),
    "KD at all four tau - smoothed labels": (
        ["kd_tau1", "kd_tau2", "kd_tau4", "kd_tau8"],
        ["label_smoothing"],
    ),
    "features and logits - features alone, mean of four": (
        ["at_logits", "ft_logits", "crd_logits", "sskd_logits"],
        ["at", "ft", "crd", "sskd"],
    ),
    "the same for AT": (["at_logits"], ["at"]),
    "the same for FT": (["ft_logits"], ["ft"]),
    "the same for CRD": (["crd_logits"], ["crd"]),
    "the same for SSKD": (["sskd_logits"], ["sskd"]),
    "KD from a teacher of smoothed labels - KD, tau 2 and 4": (
        ["kd_ls_teacher", "kd_ls_teacher_tau4"],
        ["kd_tau2", "kd_tau4"],
    ),
}
"""Comparisons of the study: means over some arms less means over others."""


def interpretability_contrasts() -> str:
    """Differences in detectors between arms, with intervals of the spread that all arms share."""
    from scipy.stats import t

    experiment = "interpretability/cifar10_arms"
    arms = {run["method"] for run in results_of(experiment)["runs"]}
    runs = {arm: [run["detectors"] for run in runs_of(experiment, arm)] for arm in arms}
    freedom = sum(len(values) - 1 for values in runs.values())
    squares = sum((value - fmean(values)) ** 2 for values in runs.values() for value in values)
    quantile = float(t.ppf(0.975, freedom)) * (squares / freedom) ** 0.5
    rows: Rows = []
    for label, (more, less) in DETECTOR_CONTRASTS.items():
        value = fmean(fmean(runs[a]) for a in more) - fmean(fmean(runs[a]) for a in less)
        variance = sum(1 / len(runs[arm]) / len(side) ** 2 for side in (more, less) for arm in side)
        half = single(quantile * variance**0.5, digits=1)
        rows.append((label, [single(value, digits=1), Cell(f"&plusmn; {half.text}")]))
    return table(("difference in detectors", "mean", "95 % interval"), rows)


def scale() -> str:
    """Costs with few records and with many, which `make bench ARGS=scale` measured."""
    return scale_figures.markdown(scale_figures.load(scale_figures.RESULTS))


def profiles() -> str:
    """Profiles of precompute, of a step and of the demo."""
    return bench_profiles.markdown(bench_profiles.load())


def busy() -> str:
    """Training of a small network next to other processes."""
    return bench_busy.markdown(bench_busy.load())


def bench() -> str:
    """Ratios that `make bench` measured."""
    return markdown(load(RESULTS))


def bench_peers() -> str:
    """Speeds of other readers beside the store's, which `make bench` measured."""
    return markdown_of_sides(load(RESULTS))


def cifar10_assistant() -> str:
    """Students of the first teacher and of its assistant, compared with the first teacher."""
    arms = {
        "labels": "labels",
        "by_teacher": "KD from the first teacher (ResNet-56)",
        "by_assistant": "KD from the assistant (ResNet-20)",
    }
    rows: Rows = []
    for arm, label in arms.items():
        runs = runs_of("cifar10_assistant", arm)
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        own += [spread(runs, name, 1, 3) for name in ("fss", "left_of_teacher")]
        rows.append((label, [*own, _difference(runs, runs_of("cifar10_assistant", "by_teacher"))]))
    header = ("compared with the ResNet-56", "test accuracy, %", "agreement, %", "FSS")
    return table((*header, "RS, left of the teacher", "accuracy - by teacher"), rows)


def claims_e2kd() -> str:
    """Claims of e2KD, with commands and results."""
    return claims_of(e2kd.CLAIMS)


def claims_ked() -> str:
    """Claims of KED."""
    return claims_of(ked.CLAIMS)


def claims_unicam() -> str:
    """Claims of UniCAM."""
    return claims_of(unicam.CLAIMS)


def claims_interpretability() -> str:
    """Claims of the interpretability study."""
    return claims_of(interpretability.CLAIMS)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        cifar10_50shots,
        cifar10_50shots_short,
        cifar10_modes,
        cifar10_bcos,
        cifar10_baselines,
        cifar10_datafree,
        cifar10_vit,
        demo_guided,
        ked_cifar10_teachers,
        ked_digits,
        ked_digits_teachers,
        ked_digits_hint,
        ked_digits_weights,
        ked_digits_retrained,
        ked_digits_levels,
        ked_cifar10,
        ked_cifar10_trunk,
        ked_wine,
        ked_breast_cancer,
        cifar10_evaluators,
        unicam_students,
        unicam_depths,
        unicam_maps,
        cifar10_assistant,
        cells,
        claims_e2kd,
        claims_ked,
        claims_unicam,
        claims_interpretability,
        interpretability_arms,
        interpretability_contrasts,
        bench,
        bench_peers,
        scale,
        profiles,
        busy,
    )
}


def with_tables(page: str) -> str:
    """Return a page with its tables filled."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", page)


def pages() -> list[Path]:
    """Pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(with_tables(path.read_text()))
