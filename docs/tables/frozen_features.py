"""Tables of frozen features: their forms, controls and methods, students without labels, and the demo's shortcut."""

from __future__ import annotations

from docs.cells import Cell, Rows, by_seed, difference, spread, table
from docs.measured import results_of, runs_of
from docs.tables.e2kd import EQUAL_TERMS, accuracies

FEATURES = "cifar10_features"
_FORMS = {
    "canonical": "of the image",
    "mirror": "and of the flipped image (default)",
    "framed": "and of a border of 1/8",
    "pooled": "and of the flipped image, 4x4 cells",
}
_CONTROLS = {
    "mirror": "all stages",
    "last_stage": "the last stage only",
    "unaugmented": "not warped with the view",
    "shuffled": "of another record",
}


def cifar10_features() -> str:
    """Students of ReviewKD with stored features, by the form of these and with controls."""
    size = {each["name"]: each["bytes"] for each in results_of(FEATURES)["passes"]}
    live, all_maps, mirror = (
        runs_of(EQUAL_TERMS, "review_kd_both"),
        runs_of(EQUAL_TERMS, "e2kd_logits_all"),
        runs_of(FEATURES, "mirror"),
    )
    rows: Rows = []
    for variant, label in _FORMS.items():
        runs = runs_of(FEATURES, variant)
        against = [difference(runs, other) for other in (mirror, live, all_maps)]
        rows.append((label, [Cell(f"{size[variant]:,.0f}"), *accuracies(runs), *against]))
    own = [difference(live, other) for other in (mirror, live, all_maps)]
    rows.append(("live", [Cell(""), *accuracies(live), *own]))
    header = ("features, test accuracy, %", "bytes per record", "by seed", "mean", "agreement")
    forms = table((*header, "minus default", "minus live", "minus e2KD, all maps, tau = 1"), rows)
    controls: Rows = []
    for variant, label in _CONTROLS.items():
        runs = runs_of(FEATURES, variant)
        controls.append((label, [*accuracies(runs), difference(runs, mirror)]))
    return "\n".join(
        [forms, table(("features, test accuracy, %", *header[2:], "minus default"), controls)]
    )


_METHODS = {
    "`method=features`, frozen, its weight searched (4,096)": (FEATURES, "features_both_4096"),
    "the same, weight 256": (FEATURES, "features_both"),
    "ReviewKD, frozen, its weight searched (80)": (FEATURES, "review_both"),
    "ReviewKD, frozen, weight 5": (FEATURES, "mirror"),
    "ReviewKD, live, weight 5": (EQUAL_TERMS, "review_kd_both"),
}


def cifar10_features_methods() -> str:
    """Methods of whole features with labels and logits, and the weights that were searched."""
    best = runs_of(FEATURES, "features_both_4096")
    rows: Rows = [
        (label, [*accuracies(runs_of(*variant)), difference(best, runs_of(*variant))])
        for label, variant in _METHODS.items()
    ]
    header = ("test accuracy, %", "by seed", "mean", "agreement", "`method=features` minus it")
    searched: Rows = [
        (
            f"{_SEARCHED_WEIGHTS[each['method']]} {each['weight']:g}",
            [Cell(f"{100 * each['holdout_accuracy']:.1f}")],
        )
        for each in results_of(FEATURES)["search"]
    ]
    return "\n".join([table(header, rows), table(("weight", "held-out accuracy, %"), searched)])


_SEARCHED_WEIGHTS = {
    "features_both": "`method.lambda_features`",
    "review_both": "`method.lambda_review`",
}

_SCREENED = {
    "mirror": ("of the image and of the flipped image, int8 (default)", "mirror"),
    "float16": ("the same, float16", "float16"),
    "framed": ("the same, and a border of 1/8", "framed"),
    "canonical": ("of the image only", "canonical"),
    "views4": ("of four stored views, replayed", "views4"),
    "views16": ("of sixteen stored views, replayed", "views16"),
    "channels16": ("default, 16 components of stages 2 and 3", "channels16"),
    "pooled": ("default, 4x4 cells", "pooled"),
    "stages_23": ("default, stages 2 and 3", "mirror"),
    "stages_13": ("default, stages 1 and 3", "mirror"),
    "stages_12": ("default, stages 1 and 2", "mirror"),
    "stage_1": ("default, stage 1", "mirror"),
    "stage_2": ("default, stage 2", "mirror"),
    "stage_3": ("default, stage 3", "mirror"),
}
"""Forms of the screen, with their labels and their passes."""


def cifar10_features_screen() -> str:
    """Short trainings with stored features in several forms, on held-out images."""
    screen = "cifar10_features_screen"
    size = {each["name"].rpartition("-")[0]: each["bytes"] for each in results_of(screen)["passes"]}
    rows: Rows = []
    for variant, (label, name) in _SCREENED.items():
        stored = f"{size[name]:,}" if variant == name else ""
        rows.append((label, [Cell(stored), by_seed(runs_of(screen, variant), "accuracy")]))
    return table(("features, held-out accuracy, %", "bytes per record", "by seed"), rows)


_ON_SWAPPED = {
    "e2kd": "e2KD, one map per record",
    "review_kd_frozen": "ReviewKD, frozen features",
}


def demo_frozen_features() -> str:
    """Students of stored features on the demo's swapped photographs."""
    baseline = runs_of("demo_frozen_features", "e2kd")
    rows: Rows = []
    for variant, label in _ON_SWAPPED.items():
        runs = runs_of("demo_frozen_features", variant)
        means = [spread(runs, name) for name in ("accuracy_in_distribution", "epg")]
        rows.append((label, [*accuracies(runs), *means, difference(runs, baseline)]))
    header = ("photographs swapped, %", "by seed", "mean", "agreement", "as in training", "EPG")
    return table((*header, "minus e2KD"), rows)


_WITHOUT_HEAD = {
    "mirror": "ReviewKD, labels and logits",
    "features_alone": "`method=features` alone, three stages",
    "embedding_alone": "`method=embedding` alone",
}


def cifar10_probes() -> str:
    """Neighbors and linear probes on features of students, with and without labels in their training."""
    baseline = runs_of(FEATURES, "mirror")
    rows: Rows = []
    for variant, label in _WITHOUT_HEAD.items():
        runs = runs_of(FEATURES, variant)
        cells = [by_seed(runs, "linear_probe"), spread(runs, "linear_probe"), spread(runs, "knn")]
        rows.append((label, [*cells, difference(runs, baseline, "linear_probe")]))
    header = ("test accuracy, %", "linear probe by seed", "linear probe", "20 nearest neighbors")
    return table((*header, "linear probe, minus ReviewKD"), rows)


def cifar10_embedding() -> str:
    """Neighbors and linear probes of students of an embedding and of labels, and of the teacher."""
    name = "cifar10_embedding"
    teacher = results_of(name)["teacher"]
    of_teacher = [Cell(""), *(Cell(f"{100 * teacher[m]:.1f}") for m in ("linear_probe", "knn"))]
    rows: Rows = [("the teacher, EfficientNet-Lite0", [*of_teacher, Cell("")])]
    baseline = runs_of(name, "labels")
    for variant, label in (("embedding", "its embedding, no labels"), ("labels", "labels alone")):
        runs = runs_of(name, variant)
        cells = [by_seed(runs, "linear_probe"), spread(runs, "linear_probe"), spread(runs, "knn")]
        rows.append((label, [*cells, difference(runs, baseline, "linear_probe")]))
    header = ("test accuracy, %", "linear probe by seed", "linear probe", "20 nearest neighbors")
    return table((*header, "linear probe, minus labels"), rows)


TABLES = (
    cifar10_features,
    cifar10_features_methods,
    cifar10_features_screen,
    demo_frozen_features,
    cifar10_probes,
    cifar10_embedding,
)
