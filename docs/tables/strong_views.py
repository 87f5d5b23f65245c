"""Tables of strong views: what the teacher says of recipes, and students that train on them."""

from __future__ import annotations

from docs.cells import Cell, Rows, by_seed, single, table
from docs.measured import measured_arms, results_of, runs_of

SCREEN = "cifar10_strong_views"
_RECIPES = {
    "": "shift and flip",
    "_color": "and color jitter",
    "_randaugment": "and RandAugment",
    "_randaugment_erasing": "and RandAugment and erasing",
    "_trivialaugment": "and TrivialAugment",
}
_METHODS = ("labels", "kd", "e2kd")


def strong_views_screen() -> str:
    """Held-out accuracy of students by recipe and method, and the teacher's spread of the mean probability."""
    of_teacher = {row["recipe"]: row for row in results_of(SCREEN)["distances"]}
    rows: Rows = []
    for ending, label in _RECIPES.items():
        spread = single(of_teacher[f"pad_crop_flip{ending}"]["probability_spread"], digits=4)
        cells = [spread]
        for method in _METHODS:
            arm = f"{method}{ending}"
            is_there = measured_arms(SCREEN, {arm: label})
            cells.append(by_seed(runs_of(SCREEN, arm), "accuracy") if is_there else Cell(""))
        rows.append((label, cells))
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
