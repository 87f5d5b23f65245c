"""Numbers in the README's sentences, computed again from the committed results and the tables of other pages."""

from __future__ import annotations

import json
import re
from collections import Counter
from decimal import Decimal
from statistics import fmean, mean
from typing import TYPE_CHECKING, Any

from docs.cells import difference_interval, numbers_of, rounded
from docs.claims.e2kd import CLAIMS
from docs.claims.sections import CONTRADICTS, OPEN, SUPPORTS, verdicts_of
from docs.links import ROOT
from docs.measured import results_of, runs_of
from docs.prose.places import place, read
from docs.tables.e2kd import EQUAL_TERMS, SHOTS
from docs.tables.frontier import POINTS, SPREAD, spread_difference
from docs.tables.overview import store_sizes
from docs.tables.strong_views import CONTROLS, TEST
from docs.tables.training_length import COMPARISONS, converged_means

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BENCHMARKS = json.loads((ROOT / "tests/benchmarks/results.json").read_text())
TIMES = {row["name"]: row["ratio"] for row in BENCHMARKS}


def whole(value: Any) -> int:
    """Return the nearest whole number; a half is rounded up."""
    return int(rounded(Decimal(str(value)), 0))


def mean_accuracy(runs: Iterable[dict[str, Any]]) -> float:
    """Return the mean accuracy over the students, in per cent."""
    return fmean(100 * run["accuracy"] for run in runs)


def speeds() -> list[str]:
    separate = TIMES["ten_frozen_vs_ten_live_students"]
    sooner = 100 * (1 - TIMES["ten_frozen_vs_ten_sharing_students"])
    (long,) = (
        row for row in BENCHMARKS if row["name"] == "ten_frozen_vs_ten_sharing_students_100_epochs"
    )
    assert long["low"] < 1 < long["high"]
    return [
        f"take {separate:.2f} times as long",
        f"{whole(sooner)} % faster for one epoch, about equal over 100",
    ]


def few_images() -> list[str]:
    stored = {point.stored: mean_accuracy(point.runs) for point in POINTS}
    labels = whole(mean_accuracy(runs_of(EQUAL_TERMS, "labels")))
    logits, features = (
        whole(
            mean_accuracy([run for run in runs_of(SPREAD, variant) if run["teacher"] == "resnet56"])
        )
        for variant in ("kd", "features")
    )
    assert max(stored, key=stored.get) == POINTS[-1].stored
    return [
        f"reach {labels} % from labels, {logits} % from stored logits and {features} % from stored features and logits",
        f"taught the most, at up to {whole(POINTS[-1].bytes / 1_700)} times the bytes of the image",
    ]


def texts(interval: Iterable[Any]) -> list[str]:
    return [str(rounded(value, 1)) for value in interval]


def maps() -> list[str]:
    variants = (runs_of(CONTROLS, f"{variant} searched") for variant in ("e2kd_v16", "kd_v16"))
    gain, *bounds = texts(difference_interval(*variants, "accuracy"))
    ten_seeds = (
        [*runs_of(SHOTS, variant), *runs_of("cifar10_fresh", variant)] for variant in ("e2kd", "kd")
    )
    single, below, above = texts(difference_interval(*ten_seeds, "accuracy"))
    for experiment, wrong, right, is_open in (
        (SHOTS, "e2kd_shuffled", "e2kd", True),
        (CONTROLS, "e2kd_v16_shuffled", "e2kd_v16 searched", False),
    ):
        pair = runs_of(experiment, right), runs_of(experiment, wrong)
        assert (difference_interval(*pair, "accuracy")[1] < 0) == is_open
    every, other = (
        [
            str(rounded(Decimal(str(value)), 1))
            for value in spread_difference("e2kd", "kd", teacher)[:3]
        ]
        for teacher in ("resnet56", "efficientnet")
    )
    return [
        f"One map per image adds {single} points to KD under shifts and flips (95 % interval {below} to {above})",
        f"It adds {gain} ({bounds[0]} to {bounds[1]}) on 16 stored views",
        f"add {every[0]} with this teacher, and {other[0]} ({other[1]} to {other[2]}) with another",
    ]


def live_teachers() -> list[str]:
    def gains(variant, experiment, stored):
        return difference_interval(
            runs_of(TEST, f"{variant}_live"), runs_of(experiment, f"{variant}_{stored}"), "accuracy"
        )

    variants = ("kd", "e2kd")
    views = [
        gains(variant, experiment, "v16") for variant in variants for experiment in (TEST, CONTROLS)
    ]
    (lead,) = {whole(interval[0]) for interval in views}
    assert all(interval[1] < 0 for interval in views)
    low, high = sorted(whole(gains(variant, TEST, "frozen")[0]) for variant in variants)
    assert all(gains(variant, CONTROLS, "v16 searched")[0] < 0 for variant in variants)
    return [
        f"led frozen targets of whole images by {low} to {high} points, and 16 stored views by {lead} (not conclusive)"
    ]


def break_even() -> list[str]:
    text = (ROOT / "docs/results/scale.md").read_text()
    epochs = [
        float(row) for row in re.findall(r"(?m)^\| (?:[^|]+\|){3} (\d\.\d\d) \([\d.]+ to", text)
    ]
    (views,) = re.findall(r"as much as a live\s+teacher\s+adds\s+in (\d+) epochs", text)
    assert len(epochs) == 4
    assert all(1 <= value <= 2 for value in epochs)
    return [
        f"1 to 2 epochs with a live teacher, or {views} with 16 views per image",
        f"for more than 2 epochs ({views} with 16 views)",
    ]


def sizes() -> list[str]:
    rows = [line.strip("| ").split(" | ") for line in store_sizes().splitlines()]
    of = {row[0]: row for row in rows}
    one, views = of["ImageNet-1k, training"], of["the same, 16 stored views"]
    records, (image, unit, _) = int(one[1].replace(",", "")), one[5].split()
    images = records * float(image) / 1e6
    assert (unit, views[4].split()[1]) == ("kB", "GB")
    return [f"{one[4]}, 16 views {whole(views[4].split()[0])} GB, images {whole(images)} GB"]


def claims_of_e2kd() -> list[str]:
    verdicts = verdicts_of(CLAIMS)
    counts = Counter(verdict for verdict, _ in verdicts.values())
    early = sum(
        verdict == SUPPORTS and one.converged != "not tested"
        for one, (verdict, _) in verdicts.items()
    )
    return [
        f"Of {counts.total()} comparisons with e2KD, {counts[SUPPORTS]} agree ({early} before KD converged), "
        f"{counts[CONTRADICTS]} disagree, {counts[OPEN]} are open"
    ]


def rounding() -> list[str]:
    earlier = results_of("demo")["earlier_runs"]
    kd, e2kd = (
        rounded(
            mean(
                numbers_of([run for run in earlier if run["method"] == variant], "accuracy_swapped")
            ),
            1,
        )
        for variant in ("kd", "e2kd")
    )
    return [f"other last bits gave KD {kd} and e2KD {e2kd}"]


def long_training() -> list[str]:
    (lengths,) = (of for name, _, of in COMPARISONS if name.startswith("demo, swapped"))
    means = converged_means()
    gain, low, high = texts(
        difference_interval(means["e2kd"], means["kd"], "accuracy_swapped", paired=True)
    )
    assert lengths[-1].epochs == 9 * lengths[0].epochs
    return [
        "after nine times as many epochs",
        f"KD is {gain} points behind when swapped ({low} to {high}, five teachers)",
    ]


MEASURED = (
    speeds, few_images, maps, live_teachers, break_even, sizes, claims_of_e2kd, rounding, long_training,
)  # fmt: skip
CONDITIONS = (
    "Python 3.11 to 3.14",
    "about 6 minutes on 2 cores",
    "From 500 images",
    "With 500 images",
    "trained on all 50,000",
    "on 5,000 other labeled images",
    "(ResNet-56 to ResNet-20)",
    "from 144 photographs",
    "CIFAR-10",
    "ImageNet-1k",
    "data.test_fraction=0.2",
)
"""Numbers that were chosen, not measured."""


def prose_of(page: str) -> str:
    """Return the sentences and cells by hand: without code, generated tables, addresses and marks."""
    text = re.sub(r"(?s)```.*?```|<!-- table.*?<!-- end -->|<!--.*?-->", " ", page)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", " ", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("`", "").split())


def unexplained_numbers(text: str) -> list[str]:
    """Return the numbers of a text, with their surroundings, that are neither a result nor a condition."""
    for phrase in (*CONDITIONS, *(phrase for compute in MEASURED for phrase in compute())):
        text = text.replace(phrase, "")
    return re.findall(r".{0,30}\d.{0,30}", re.sub(r"\be2KD\b|\bS3\b", "", text))


def problems() -> Iterator[str]:
    """Iterate over measured phrases that the README lacks, and over numbers that are not in one."""
    text = prose_of(read("README.md"))
    for compute in MEASURED:
        for phrase in compute():
            if phrase not in text:
                yield f"{place('README.md')} write {phrase!r} ({compute.__name__} in docs/prose/readme_numbers.py)"
    for number in unexplained_numbers(text):
        yield f"{place('README.md')} {number!r}: add what measures it to docs/prose/readme_numbers.py"
