"""Numbers in the README's sentences, computed again from the committed results and the tables of other pages."""

import json
import re
from collections import Counter
from decimal import Decimal
from statistics import fmean

import pytest

from docs.cells import difference, paired_interval, rounded
from docs.claims.e2kd import CLAIMS
from docs.claims.sections import CONTRADICTS, OPEN, SUPPORTS, verdicts_of
from docs.measured import runs_of
from docs.tables.e2kd import EQUAL_TERMS, SHOTS
from docs.tables.frontier import POINTS
from docs.tables.overview import store_sizes
from docs.tables.strong_views import CONTROLS, TEST
from docs.tables.training_length import COMPARISONS
from tests.support.paths import ROOT

TIMES = {
    row["name"]: row["ratio"]
    for row in json.loads((ROOT / "tests/benchmarks/results.json").read_text())
}


def whole(value):
    """Nearest whole number; a half is rounded up."""
    return int(rounded(Decimal(str(value)), 0))


def mean_accuracy(runs):
    """Mean accuracy over the students, in per cent."""
    return fmean(100 * run["accuracy"] for run in runs)


def speeds():
    separate = TIMES["ten_frozen_vs_ten_live_students"]
    sooner = 100 * (1 - TIMES["ten_frozen_vs_ten_sharing_students"])
    return [f"takes {separate:.2f} times as long", f"finish {whole(sooner)} % sooner"]


def few_images():
    stored = {point.stored: mean_accuracy(point.runs) for point in POINTS}
    labels = whole(mean_accuracy(runs_of(EQUAL_TERMS, "labels")))
    logits = whole(stored["logits alone"])
    assert max(stored, key=stored.get) == POINTS[-1].stored
    return [
        f"reach {labels} % from labels, {logits} % from stored logits and {whole(max(stored.values()))} % from "
        "stored features",
        f"taught the most, at up to {whole(POINTS[-1].bytes / 1_700)} times the image's bytes",
    ]


def maps():
    arms = (runs_of(CONTROLS, f"{arm} searched") for arm in ("e2kd_v16", "kd_v16"))
    gain, low, high = re.findall(r"\d+\.\d", difference(*arms, "accuracy").text)
    single, below, above = paired_interval(
        runs_of(SHOTS, "e2kd"), runs_of(SHOTS, "kd"), "accuracy", 100
    )
    assert below < 0 < above
    return [
        f"maps add {gain} points to KD (95 % interval {low} to {high})",
        f"adds {rounded(Decimal(str(single)), 1)} points, which is not conclusive",
    ]


def live_teachers():
    def gains(baseline):
        live = (
            (runs_of(TEST, f"{m}_live"), runs_of(TEST, f"{m}_{baseline}")) for m in ("kd", "e2kd")
        )
        return [whole(paired_interval(*pair, "accuracy", 100)[0]) for pair in live]

    (views,) = set(gains("v16"))
    low, high = sorted(gains("frozen"))
    return [
        f"{views} points better than 16 stored views, and {low} to {high} points better than one"
    ]


def break_even():
    text = (ROOT / "docs/results/scale.md").read_text()
    epochs = [
        float(row) for row in re.findall(r"(?m)^\| (?:[^|]+\|){3} (\d\.\d\d) \([\d.]+ to", text)
    ]
    (views,) = re.findall(r"as much as a live\s+teacher\s+adds\s+in (\d+) epochs", text)
    assert len(epochs) == 4
    assert all(1 <= value <= 2 for value in epochs)
    return [
        f"1 to 2 epochs, or after {views} with 16 views",
        f"for more than 2 epochs ({views} with 16 views)",
    ]


def sizes():
    rows = [line.strip("| ").split(" | ") for line in store_sizes().splitlines()]
    of = {row[0]: row for row in rows}
    one, views = of["ImageNet-1k, training"], of["the same, 16 stored views"]
    records, (image, unit, _) = int(one[1].replace(",", "")), one[5].split()
    images = records * float(image) / 1e6
    assert (unit, views[4].split()[1]) == ("kB", "GB")
    return [f"{one[4]}, 16 views {whole(views[4].split()[0])} GB, images {whole(images)} GB"]


def claims_of_e2kd():
    counts = Counter(verdict for verdict, _ in verdicts_of(CLAIMS).values())
    return [
        f"support {counts[SUPPORTS]} of {counts.total()} e2KD claims, contradict {counts[CONTRADICTS]} and leave "
        f"{counts[OPEN]} open"
    ]


def long_training():
    (lengths,) = (of for name, _, of in COMPARISONS if name.startswith("demo, swapped"))
    first, last = lengths[0], lengths[-1]
    runs = (runs_of(last.experiment, arm) for arm in (last.candidate, last.baseline))
    gain, *_ = paired_interval(*runs, "accuracy_swapped", 100)
    assert last.epochs == 9 * first.epochs
    return [
        "after nine times as many epochs",
        f"only {rounded(Decimal(str(gain)), 1)} points behind e2KD on swapped photographs",
    ]


MEASURED = (
    speeds, few_images, maps, live_teachers, break_even, sizes, claims_of_e2kd, long_training,
)  # fmt: skip
CONDITIONS = (
    "Python 3.11 to 3.14",
    "about 4 minutes on 2 cores",
    "From 500 images",
    "With 500 images",
    "trained on all 50,000",
    "With 16 stored views",
    "CIFAR-10",
    "ImageNet-1k",
    "data.test_fraction=0.2",
)
"""Numbers that were chosen, not measured."""


def prose_of(page):
    """Sentences and cells by hand: without blocks of code, generated tables, addresses, marks and names with digits."""
    text = re.sub(r"(?s)```.*?```|<!-- table.*?<!-- end -->|<!--.*?-->", " ", page)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", " ", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("`", "").split())


def unexplained_numbers(text):
    """Numbers of a text, with their surroundings, that are neither a result nor a condition."""
    for phrase in (*CONDITIONS, *(phrase for compute in MEASURED for phrase in compute())):
        text = text.replace(phrase, "")
    return re.findall(r".{0,30}\d.{0,30}", re.sub(r"\be2KD\b|\bS3\b", "", text))


def test_every_number_of_the_readme_is_a_result_or_a_condition():
    text = prose_of((ROOT / "README.md").read_text())

    for compute in MEASURED:
        assert [phrase for phrase in compute() if phrase not in text] == [], compute.__name__
    assert unexplained_numbers(text) == []


@pytest.mark.parametrize(
    ("number", "other"),
    [("1.57", "1.58"), ("69 %", "70 %"), ("4.8 points", "5 points"), ("142 GB", "140 GB")],
)
def test_another_number_is_noticed(number, other):
    text = prose_of((ROOT / "README.md").read_text())

    assert unexplained_numbers(text.replace(number, other)) != []
