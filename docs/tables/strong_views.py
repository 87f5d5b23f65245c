"""Tables of strong views: what the teacher says of recipes, and students that train on them."""

from __future__ import annotations

from statistics import fmean

from scipy.stats import spearmanr

from docs.cells import Cell, Rows, by_seed, difference, single, spread, table
from docs.measured import results_of, runs_of

SCREEN, TEST = "cifar10_strong_views_screen", "cifar10_strong_views"
CONTROLS = "cifar10_controls"
_RECIPES = {
    "": "shift and flip",
    "_color": "and color jitter",
    "_randaugment": "and RandAugment",
    "_randaugment_erasing": "and RandAugment and erasing",
    "_trivialaugment": "and TrivialAugment",
}
_METHODS = ("labels", "kd", "e2kd")


def strong_views_screen() -> str:
    """Held-out accuracy of students by recipe and method, and the teacher's spread of the mean probability.

    The last row is the rank correlation of the recipes' mean accuracies with the spread, whose sign is turned.
    """
    of_teacher = {row["recipe"]: row for row in results_of(SCREEN)["distances"]}
    spreads = [of_teacher[f"pad_crop_flip{e}"]["probability_spread"] for e in _RECIPES]
    columns = {
        method: [runs_of(SCREEN, f"{method}{ending}") for ending in _RECIPES] for method in _METHODS
    }
    rows: Rows = [
        (
            label,
            [
                single(spread, digits=4),
                *(by_seed(variants[number], "accuracy") for variants in columns.values()),
            ],
        )
        for number, (label, spread) in enumerate(zip(_RECIPES.values(), spreads, strict=True))
    ]
    correlations = [
        spearmanr(
            [-spread for spread in spreads],
            [fmean(run["accuracy"] for run in runs) for runs in variants],
        ).statistic
        for variants in columns.values()
    ]
    rows.append(("rank correlation with a low spread", [Cell(""), *map(single, correlations)]))
    header = ("held-out accuracy, % (by seed)", "spread of the teacher's mean probability")
    return table((*header, "labels", "KD, replayed", "e2KD, replayed"), rows)


def strong_views_distances() -> str:
    """Distance of frozen targets of whole images from the teacher's answers to views, by recipe."""
    rows: Rows = []
    for row in results_of(SCREEN)["distances"]:
        label = _RECIPES[row["recipe"].removeprefix("pad_crop_flip")]
        cells = [
            single(row["logits_kl"]),
            single(row["top1_agreement"], 100, 1),
            single(row["map_cosine"], digits=3),
        ]
        rows.append((label, cells))
    header = ("recipe", "KL(new, stored) of the logits, nats", "top-1 class unchanged, %")
    return table((*header, "cosine of the moved map with the new one"), rows)


_PLAIN = {
    "labels": ("cifar10_equal_terms", "labels"),
    "kd_frozen": ("cifar10_50shots", "kd"),
    "e2kd_frozen": ("cifar10_50shots", "e2kd"),
    "kd_v16": (TEST, "kd_plain_v16"),
    "e2kd_v16": (TEST, "e2kd_plain_v16"),
    "kd_v16_long": (TEST, "kd_plain_v16_long"),
}
"""Students of shifts and flips with the same targets as those of a variant: experiment and variant."""
_TARGETS = {
    "labels": "labels",
    "kd_frozen": "frozen KD",
    "kd_v4": "KD, V = 4",
    "kd_v16": "KD, V = 16",
    "kd_live": "live KD",
    "e2kd_frozen": "frozen e2KD",
    "e2kd_v4": "e2KD, V = 4",
    "e2kd_v16": "e2KD, V = 16",
    "e2kd_live": "live e2KD",
    "kd_v16_long": "KD, V = 16, 360 epochs",
}


def strong_views_test() -> str:
    """Test accuracy with the strong recipe beside the plain one, for each kind of targets that has two seeds or more.

    The difference is over the seeds that both have.
    """
    measured = {run["method"] for run in results_of(TEST)["runs"]}
    rows: Rows = []
    for variant, label in _TARGETS.items():
        strong = runs_of(TEST, variant) if variant in measured else []
        if len(strong) < 2:
            continue
        experiment, plain_variant = _PLAIN.get(variant, ("", ""))
        plain = (
            runs_of(experiment, plain_variant)
            if plain_variant and plain_variant in _variants(experiment)
            else []
        )
        compared = len(plain) > 1
        cells = [
            by_seed(plain, "accuracy") if compared else Cell(""),
            by_seed(strong, "accuracy"),
            spread(plain, "accuracy") if compared else Cell(""),
            spread(strong, "accuracy"),
            difference(strong, plain, "accuracy") if compared else Cell(""),
        ]
        rows.append((label, cells))
    header = (
        "test accuracy, %",
        "shift and flip, by seed",
        "strong recipe, by seed",
        "shift and flip",
    )
    return table((*header, "strong recipe", "difference"), rows)


def _variants(experiment: str) -> set[str]:
    return {run["method"] for run in results_of(experiment)["runs"]}


def strong_views_modes() -> str:
    """Differences between frozen, replayed and live targets of the strong recipe, with intervals over five seeds."""
    pairs = {
        "replayed minus frozen": ("v16", "frozen"),
        "live minus replayed": ("live", "v16"),
        "live minus frozen": ("live", "frozen"),
    }
    rows: Rows = [
        (
            label,
            [
                difference(runs_of(TEST, f"{m}_{one}"), runs_of(TEST, f"{m}_{other}"), "accuracy")
                for m in ("kd", "e2kd")
            ],
        )
        for label, (one, other) in pairs.items()
    ]
    methods = [
        difference(runs_of(TEST, f"e2kd_{mode}"), runs_of(TEST, f"kd_{mode}"), "accuracy")
        for mode in ("frozen", "v16", "live")
    ]
    rows += [
        (f"e2KD minus KD, {label}", [Cell(""), cell])
        for label, cell in zip(("frozen", "replayed", "live"), methods, strict=True)
    ]
    return table(("points of test accuracy, strong recipe", "KD", "e2KD"), rows)


_CONTROLLED = {
    "kd_v16": "KD",
    "e2kd_v16_shuffled": "e2KD, maps of other images",
    "e2kd_v16_first_view": "e2KD, the map of the record's first view",
    "e2kd_v16": "e2KD",
}


def strong_views_controls() -> str:
    """Students of 16 strong stored views with right and with wrong maps."""
    rows: Rows = []
    for options, words in ((" searched", ", searched"), ("", "")):
        variants = {variant: runs_of(CONTROLS, f"{variant}{options}") for variant in _CONTROLLED}
        for variant, label in _CONTROLLED.items():
            runs = variants[variant]
            cells = [by_seed(runs, "accuracy"), spread(runs, "accuracy"), spread(runs, "agreement")]
            for one, other in ((variant, "kd_v16"), ("e2kd_v16", variant)):
                shown = one != other
                cells.append(
                    difference(variants[one], variants[other], "accuracy") if shown else Cell("")
                )
            rows.append((label + words, cells))
    header = ("test accuracy, %, V = 16", "by seed", "mean", "agreement", "minus KD")
    return table((*header, "e2KD minus it"), rows)


def rules_on_views() -> str:
    """The rule of MixUp applied to 16 stored views, compared with the teacher's answers to stored mixtures."""
    rows: Rows = []
    for method, label in (("kd", "KD"), ("e2kd", "e2KD")):
        rule = runs_of(CONTROLS, f"{method}_replayed_mixup")
        stored = runs_of("cifar10_mixtures", f"{method}_stored")
        cells = [
            by_seed(rule, "accuracy"),
            spread(rule, "accuracy"),
            difference(rule, runs_of(TEST, f"{method}_plain_v16"), "accuracy"),
            difference(stored, rule, "accuracy"),
        ]
        rows.append((label, cells))
    header = ("test accuracy, %, rule on 16 stored views", "by seed", "mean")
    return table((*header, "minus stored views", "stored mixtures minus it"), rows)


def photographs_windows() -> str:
    """Students of views of files and of frames, by their learning rates."""
    name = "photographs_windows"
    rows: Rows = [
        (
            f"{pixels}, lr {rate.replace('e', 'e-')}",
            [
                Cell(str(len(runs))),
                spread(runs, "kl_to_teacher", 1, 3),
                spread(runs, "agreement"),
            ],
        )
        for rate in ("3e5", "1e4", "3e4")
        for pixels in ("files", "frames")
        for runs in [runs_of(name, f"{pixels}_{rate}")]
    ]
    best = (runs_of(name, "files_1e4"), runs_of(name, "frames_1e4"))
    cells = [difference(*best, "kl_to_teacher", 1, 3), difference(*best, "agreement")]
    rows.append(("files minus frames, lr 1e-4", [Cell("5"), *cells]))
    return table(("views of", "seeds", "divergence from the teacher, nats", "agreement, %"), rows)


TABLES = (
    strong_views_screen,
    strong_views_distances,
    strong_views_test,
    strong_views_modes,
    strong_views_controls,
    rules_on_views,
    photographs_windows,
)
