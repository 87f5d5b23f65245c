"""Tables of strong views: what the teacher says of recipes, and students that train on them."""

from __future__ import annotations

from statistics import fmean

from scipy.stats import spearmanr

from docs.cells import Cell, Rows, by_seed, single, table
from docs.measured import results_of, runs_of

SCREEN = "cifar10_strong_views_screen"
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
                *(by_seed(arms[number], "accuracy") for arms in columns.values()),
            ],
        )
        for number, (label, spread) in enumerate(zip(_RECIPES.values(), spreads, strict=True))
    ]
    correlations = [
        spearmanr(
            [-spread for spread in spreads],
            [fmean(run["accuracy"] for run in runs) for runs in arms],
        ).statistic
        for arms in columns.values()
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
    header = ("recipe", "KL of stored to new logits, nats", "top-1 class unchanged, %")
    return table((*header, "cosine of the moved map with the new one"), rows)


TABLES = (strong_views_screen, strong_views_distances)
