"""Tables of e2KD: students of CIFAR-10, and the guided teachers of the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from docs.cells import (
    Cell,
    Rows,
    Run,
    average,
    by_seed,
    difference,
    single,
    spread,
    table,
    with_best,
)
from docs.measured import results_of, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

AGAINST_KD = "difference from frozen KD"
SHOTS, EQUAL_TERMS = "cifar10_50shots", "cifar10_equal_terms"
SHOTS_VARIANTS = {
    "labels": "labels only",
    "kd": "frozen KD",
    "e2kd": "frozen e2KD",
    "e2kd_unaugmented": "frozen e2KD, maps not warped with the image",
    "e2kd_shuffled": "frozen e2KD, maps shuffled",
}


def cifar10_50shots() -> str:
    """Students of CIFAR-10 with 50 images per class, seed by seed."""
    rows = []
    for variant, label in SHOTS_VARIANTS.items():
        # Students of labels have no temperature, and those of the equal terms have the same options.
        runs = runs_of(EQUAL_TERMS if variant == "labels" else SHOTS, variant)
        rows.append((label, [*accuracies(runs), difference(runs, runs_of(SHOTS, "kd"))]))
    return table(("test accuracy, %", "by seed", "mean", "agreement", AGAINST_KD), rows)


def cifar10_modes() -> str:
    """Frozen, replayed and live targets with GradCAM."""
    views = {
        item["views"]: f"{item['bytes']:,.0f}"
        for item in reversed(results_of("cifar10_replay")["passes"])
    }
    # KD reads no maps, so its bytes are those of the other fields.
    variants = [
        ("frozen KD", "cifar10_live", "kd", "20"),
        ("live KD", "cifar10_live", "kd_live", ""),
        ("replayed KD, V = 16", "cifar10_replay", "kd_v16", "749"),
        ("frozen e2KD", "cifar10_live", "e2kd", views["1 canonical"]),
        ("replayed e2KD, V = 1", "cifar10_replay", "e2kd_v1", views["1 random"]),
        ("replayed e2KD, V = 4", "cifar10_replay", "e2kd_v4", views["4 random"]),
        ("replayed e2KD, V = 16", "cifar10_replay", "e2kd_v16", views["16 random"]),
        ("live e2KD", "cifar10_live", "e2kd_live", ""),
    ]
    rows = []
    for label, experiment, variant, size in variants:
        runs = runs_of(experiment, variant)
        seeds = [single(run["accuracy"], 100, 1) for run in runs]
        own = [spread(runs, "accuracy"), spread(runs, "agreement"), average(runs, "seconds", 1, 0)]
        frozen = runs_of("cifar10_live", variant.partition("_")[0])
        rows.append((label, [*seeds, *own, Cell(size), difference(runs, frozen)]))
    header = ("test accuracy, %", "seed 0", "seed 1", "seed 2", "mean", "agreement")
    return table(
        (*header, "seconds per student", "bytes per record", "difference from frozen"),
        with_best(rows, [3]),
    )


def cifar10_fresh() -> str:
    """Frozen and live targets with seeds that no other experiment has."""
    name = "cifar10_fresh"
    variants = {
        "kd": "frozen KD",
        "e2kd": "frozen e2KD",
        "kd_live": "live KD",
        "e2kd_live": "live e2KD",
        "kd_both": "frozen KD, with labels",
        "e2kd_both": "frozen e2KD, with labels",
    }
    rows: Rows = []
    for variant, label in variants.items():
        runs, other = runs_of(name, variant), variant.replace("e2kd", "kd")
        gain = Cell("") if other == variant else difference(runs, runs_of(name, other))
        rows.append((label, [*accuracies(runs), gain]))
    header = ("test accuracy, %", "by seed, 10 to 14", "mean", "agreement", "minus KD")
    return table(header, rows)


def accuracies(runs: Sequence[Run]) -> list[Cell]:
    """Accuracy by seed, its mean, and the mean agreement."""
    return [by_seed(runs, "accuracy"), spread(runs, "accuracy"), spread(runs, "agreement")]


def cifar10_bcos() -> str:
    """Frozen, replayed and live targets of B-cos networks."""
    variants = {
        "labels": "labels only",
        "kd": "frozen KD",
        "kd_live": "live KD",
        "e2kd": "frozen e2KD",
        "e2kd_v4": "replayed e2KD, V = 4",
        "e2kd_v16": "replayed e2KD, V = 16",
        "e2kd_live": "live e2KD",
        "e2kd_unaugmented": "frozen e2KD, maps not warped with the image",
        "e2kd_shuffled": "frozen e2KD, maps shuffled",
    }
    rows = []
    for variant, label in variants.items():
        runs = runs_of("cifar10_bcos", variant)
        own = accuracies(runs)
        own += [average(runs, "map_cosine", 1, 2), average(runs, "seconds", 1, 0)]
        rows.append((label, [*own, difference(runs, runs_of("cifar10_bcos", "kd"))]))
    header = ("test, %", "accuracy by seed", "accuracy", "agreement", "map cosine")
    return table((*header, "seconds per student", AGAINST_KD), with_best(rows, [1, 2]))


def cifar10_baselines() -> str:
    """Baselines of e2KD."""
    variants = [
        ("labels only", EQUAL_TERMS, "labels"),
        ("frozen KD", SHOTS, "kd"),
        ("frozen e2KD", SHOTS, "e2kd"),
        ("frozen AT, with labels", "cifar10_baselines", "at"),
        ("frozen CAT-KD, with labels", "cifar10_baselines", "cat_kd"),
        ("ReviewKD, live, with labels, a third of the epochs", "cifar10_baselines", "review_kd"),
    ]
    rows = []
    for label, experiment, variant in variants:
        runs = runs_of(experiment, variant)
        own = accuracies(runs)
        rows.append((label, [*own, difference(runs, runs_of(SHOTS, "e2kd"))]))
    header = ("test accuracy, %", "by seed", "mean", "agreement", "difference from frozen e2KD")
    return table(header, rows)


def cifar10_equal_terms() -> str:
    """Methods that all have the labels, the teacher's logits or both, and maps that e2KD is combined with."""
    return "\n".join([_methods_by_terms(), _maps_beside_logits()])


LOGITS_BYTES = 2 * 10
TARGET_BYTES = {
    "one map": 2 * 8**2 + 8,
    "2 maps": 2 * (2 * 8**2 + 8),
    "5 maps": 5 * (2 * 8**2 + 8),
    "10 maps": 10 * (2 * 8**2 + 8),
    "attention": 2 * (32**2 + 16**2 + 8**2) + 3 * 4,
    "class maps": 10 * (2 * 2**2 + 4),
    "class maps, 8x8": 10 * (2 * 8**2 + 4),
    "features": 51_462 - LOGITS_BYTES,
}
"""Bytes per record of the targets that methods read beside ten logits, of a ResNet-56 and images of 32 pixels."""


def bytes_cell(target: str = "", *, with_logits: bool = True) -> Cell:
    """Bytes per record of a target, and of the logits if the student reads them."""
    count = (LOGITS_BYTES if with_logits else 0) + (TARGET_BYTES[target] if target else 0)
    return Cell(f"{count:,}")


def _methods_by_terms() -> str:
    terms = ("labels", "logits", "both")
    methods = {
        "plain": "nothing further (labels only, KD)",
        "e2kd": "e2KD, maps of one class (with labels: map loss, no logits)",
        "at": "AT",
        "cat_kd": "CAT-KD",
        "review_kd": "ReviewKD, live",
    }
    plain = {"labels": "labels", "logits": "kd_logits", "both": "kd_both"}
    targets = {"e2kd": "one map", "at": "attention", "cat_kd": "class maps"}

    def runs(method: str, term: str) -> list[Run]:
        return runs_of(EQUAL_TERMS, plain[term] if method == "plain" else f"{method}_{term}")

    def cells(method: str, entry: Callable[[list[Run], list[Run]], Cell]) -> list[Cell]:
        return [
            entry(runs(method, term), runs("e2kd", term))
            if (method, term) != ("review_kd", "logits")
            else Cell("not run")
            for term in terms
        ]

    rows: Rows = []
    for method, label in methods.items():
        size = bytes_cell(targets.get(method, ""), with_logits=False)
        size = Cell("") if method == "review_kd" else size
        rows.append((label, [size, *cells(method, lambda own, _: spread(own, "accuracy"))]))
    rows += [
        (
            f"{label.partition(',')[0].partition(' (')[0]} minus e2KD",
            [Cell(""), *cells(method, difference)],
        )
        for method, label in methods.items()
        if method != "e2kd"
    ]
    header = ("test accuracy, %", "bytes per record beside logits (20)")
    return table((*header, "with labels", "with logits", "with both"), rows)


def _maps_beside_logits() -> str:
    variants = {
        "e2kd_logits": ("maps of the first class", ("one map",)),
        "e2kd_logits_top2": ("maps of the first 2 classes", ("2 maps",)),
        "e2kd_logits_top5": ("maps of the first 5 classes", ("5 maps",)),
        "e2kd_logits_all": ("maps of all 10 classes", ("10 maps",)),
        "e2kd_cat_kd_logits": (
            "the first class's map and CAT-KD's maps",
            ("one map", "class maps"),
        ),
    }
    rows: Rows = []
    for variant, (label, targets) in variants.items():
        runs = runs_of(EQUAL_TERMS, variant)
        size = LOGITS_BYTES + sum(TARGET_BYTES[target] for target in targets)
        own = [Cell(f"{size:,}"), *accuracies(runs)]
        baselines = ("e2kd_logits", "at_logits", "cat_kd_logits")
        gains = [difference(runs, runs_of(EQUAL_TERMS, baseline)) for baseline in baselines]
        rows.append((label, [*own, *gains]))
    header = (
        "e2KD with logits, test accuracy, %",
        "bytes per record",
        "by seed",
        "mean",
        "agreement",
    )
    return table((*header, "minus one class", "minus AT", "minus CAT-KD"), rows)


class Searched(NamedTuple):
    """Students of a method with logits whose options were searched alike."""

    experiment: str
    variant: str
    before: str
    """Variant at tau = 1, with the weight that was chosen once."""
    options: str
    target: str = ""
    """Entry of TARGET_BYTES."""


CAT_KD = "CAT-KD, maps of 8x8 cells"
SEARCHED = {
    "KD": Searched(SHOTS, "kd", "kd_logits", "tau = 4"),
    "e2KD, one map per record": Searched(
        SHOTS, "e2kd", "e2kd_logits", "tau = 4, weight 10", "one map"
    ),
    "AT": Searched(
        EQUAL_TERMS, "at_logits searched", "at_logits", "tau = 4, weight 16,000", "attention"
    ),
    "CAT-KD, maps of 2x2 cells": Searched(
        EQUAL_TERMS, "cat_kd_logits searched", "cat_kd_logits", "tau = 1, weight 16", "class maps"
    ),
    CAT_KD: Searched(
        EQUAL_TERMS,
        "cat_kd_logits searched size=8",
        "cat_kd_logits",
        "tau = 4, weight 16",
        "class maps, 8x8",
    ),
    "e2KD, maps of all classes": Searched(
        EQUAL_TERMS,
        "e2kd_logits_all searched tau=8",
        "e2kd_logits_all",
        "tau = 8, weight 640",
        "10 maps",
    ),
    "the same, second of the search": Searched(
        EQUAL_TERMS,
        "e2kd_logits_all searched",
        "e2kd_logits_all",
        "tau = 4, weight 160",
        "10 maps",
    ),
}


def searched_runs(label: str) -> list[Run]:
    """Return the students of a method whose options were searched alike."""
    return runs_of(SEARCHED[label].experiment, SEARCHED[label].variant)


def cifar10_equal_terms_searched() -> str:
    """Methods with logits, the temperature and the weight of each chosen on held-out images, and the candidates."""
    rows: Rows = []
    for label, method in SEARCHED.items():
        runs = searched_runs(label)
        others = [runs_of(EQUAL_TERMS, method.before), *map(searched_runs, ("KD", "AT", CAT_KD))]
        gains = [difference(runs, other) for other in others]
        size = bytes_cell(method.target)
        rows.append((label, [size, Cell(method.options), *accuracies(runs), *gains]))
    header = ("with logits, test accuracy, %", "bytes per record", "chosen", "by seed", "mean")
    gain = ("minus before", "minus KD", "minus AT", "minus CAT-KD, 8x8")
    return "\n".join([table((*header, "agreement", *gain), rows), _candidates()])


def _candidates() -> str:
    """Held-out accuracy of each candidate of the search."""
    names = {
        "at": ("AT", "lambda_at"),
        "cat_kd": ("CAT-KD, 2x2", "lambda_cat"),
        "cat_kd size=8": ("CAT-KD, 8x8", "lambda_cat"),
        "e2kd_all": ("e2KD, maps of all classes", "lambda_map"),
    }
    tried = results_of(EQUAL_TERMS)["search"]
    rows: Rows = []
    for method, (label, option) in names.items():
        for tau in sorted({row["tau"] for row in tried if row["method"] == method}):
            found = sorted(
                (row[option], row["holdout_accuracy"])
                for row in tried
                if (row["method"], row["tau"]) == (method, tau)
            )
            text = ", ".join(f"{weight:,}: {single(value, 100, 1).text}" for weight, value in found)
            rows.append((label, [Cell(str(tau)), Cell(text)]))
    return table(("candidates", "tau", "weight: held-out accuracy, %"), rows)


def cifar10_top_logits() -> str:
    """KD with the largest logits of a pass."""
    rows = []
    for variant, label in (
        ("kd", "all 10"),
        ("kd k=5", "the 5 largest"),
        ("kd k=3", "the 3 largest"),
    ):
        runs = runs_of(SHOTS, variant)
        cells = [*accuracies(runs), difference(runs, runs_of(SHOTS, "kd"))]
        rows.append((label, cells))
    header = ("logits, test accuracy, %", "by seed", "mean", "agreement")
    return table((*header, "minus all 10"), rows)


def student_precision() -> str:
    """Students trained in bfloat16 and in float32."""
    rows = []
    for variant, label in (("kd", "KD"), ("e2kd", "e2KD")):
        exact, lower = (runs_of(SHOTS, f"{variant}{end}") for end in ("", " bfloat16"))
        cells = [spread(exact, "accuracy"), spread(lower, "accuracy"), difference(lower, exact)]
        rows.append((label, [*cells, difference(lower, exact, "agreement")]))
    header = ("test accuracy, %", "float32", "bfloat16", "difference", "agreement, difference")
    return table(header, rows)


def cifar10_datafree() -> str:
    """Students that never saw their teacher's images."""
    rows = []
    for variant, label in (("kd", "frozen KD"), ("e2kd", "frozen e2KD")):
        runs = runs_of("cifar10_datafree", variant)
        own = accuracies(runs)
        rows.append((label, [*own, difference(runs, runs_of("cifar10_datafree", "kd"))]))
    header = ("trained on 5,760 images of digits on photographs", "accuracy by seed")
    return table((*header, "accuracy", "agreement", AGAINST_KD), with_best(rows, [1]))


def cifar10_vit() -> str:
    """Shift curves of a ViT."""
    curves = results_of("cifar10_vit")["shift_curves"]
    rows = [
        (f"{kind}, frozen {label}", [single(value) for value in curves[variant][name][1:]])
        for name, kind in (("map", "W"), ("contribution", "contributions"))
        for variant, label in (("kd", "KD"), ("e2kd", "e2KD"))
    ]
    return table(("", *map(str, range(1, 9))), rows)


DEMO_VARIANTS = {
    "labels": "labels only",
    "kd": "frozen KD",
    "e2kd": "frozen e2KD",
    "e2kd_shuffled": "frozen e2KD, maps shuffled",
}


def demo() -> str:
    """Students of the demo."""
    metrics = {
        "accuracy_in_distribution": "as in training",
        "accuracy_swapped": "swapped",
        "epg": "EPG",
        "agreement": "agreement",
    }
    teacher = results_of("demo")["teacher"]
    own = [single(teacher[name], 100, 1) if name in teacher else Cell("") for name in metrics]
    rows: Rows = [("teacher", [*own, Cell("")])]
    for variant, label in DEMO_VARIANTS.items():
        runs = runs_of("demo", variant)
        gain = difference(runs, runs_of("demo", "kd"), "accuracy_swapped")
        rows.append((label, [*(spread(runs, name) for name in metrics), gain]))
    return table(("%, three seeds", *metrics.values(), "swapped, difference from frozen KD"), rows)


def demo_short() -> str:
    """Accuracy of the demo's students under both test sets."""
    labels = {
        "labels": "labels only",
        "kd": "stored logits (KD)",
        "e2kd": "stored logits and maps (e2KD: the student's map must match its teacher's)",
        "e2kd_shuffled": "stored logits, and maps of other images (control)",
    }
    rows: Rows = [
        (
            label,
            [
                spread(runs_of("demo", variant), f"accuracy_{photographs}")
                for photographs in ("in_distribution", "swapped")
            ],
        )
        for variant, label in labels.items()
    ]
    return table(
        (
            "accuracy in %, mean &plusmn; deviation of 3 seeds",
            "photographs as in training",
            "swapped",
        ),
        rows,
    )


def demo_features() -> str:
    """Features that students of the demo share with their teacher."""
    metrics = {
        "fss": "FSS",
        "relevance": "relevance",
        "left_of_teacher": "RS, teacher only",
        "beyond_labels": "RS, not in the labels-only student",
        "mask_energy": "loss gradient's energy on the digit, above its area",
    }
    rows: Rows = []
    for variant, label in DEMO_VARIANTS.items():
        runs = runs_of("demo", variant)
        own = [spread(runs, name, 1, 2) if name in runs[0] else Cell("&ndash;") for name in metrics]
        rows.append((label, [*own, difference(runs, runs_of("demo", "labels"), "fss", 1, 2)]))
    return table(("", *metrics.values(), "FSS, difference from labels only"), rows)


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
        rows.append((title, [*(single(of[name], 100, 1) for name in names), Cell(""), Cell("")]))
        kd = runs_of("demo_guided", f"kd{ending}")
        for variant, label in (("kd", "KD"), ("e2kd", "e2KD")):
            runs = runs_of("demo_guided", variant + ending)
            metrics = ("epg", "iou", "accuracy_in_distribution", "accuracy_swapped")
            cells = [spread(runs, metric) for metric in metrics]
            if variant == "e2kd" and ending:
                cells[0] = Cell(cells[0].bold)
            gains = [difference(runs, kd, metric) for metric in ("epg", "accuracy_swapped")]
            rows.append((f"its students, frozen {label}", [*cells, *gains]))
    header = ("", "EPG", "IoU", "accuracy, as in training", "photographs swapped")
    return table(
        (*header, "EPG, difference from frozen KD", "swapped, difference from frozen KD"), rows
    )


TABLES = (
    cifar10_50shots,
    cifar10_modes,
    cifar10_fresh,
    cifar10_bcos,
    cifar10_baselines,
    cifar10_equal_terms,
    cifar10_equal_terms_searched,
    cifar10_top_logits,
    student_precision,
    cifar10_datafree,
    cifar10_vit,
    demo,
    demo_short,
    demo_features,
    demo_guided,
)
