"""Sentences at the top of a report: nothing is concluded from one seed or from an interval that contains 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind

from permafrost.core.errors import ConfigError
from permafrost_report.comparison import (
    ScoredRow,
    accuracy_interval,
    differences_by_column,
    excludes_zero,
    leading_variants,
    summarize,
    variant_difference,
    welch_interval,
)
from permafrost_report.conclusions import (
    chance_remarks,
    conclusions,
    remarks_in_words,
    student_to_ship,
    unmeasured_accuracy,
)
from permafrost_report.main_table import ChanceLimit, Column, accuracy_limit
from permafrost_report.model_selection import Candidate, ModelSelection
from permafrost_report.student_results import StudentResult

ACCURACY = Column(name="accuracy", source="test.accuracy")
KL = Column(name="kl", source="test.kl_to_teacher")
PAIR = ("e2kd", "kd")


def rows_of(column="accuracy", **variants):
    return [
        {"method": variant, "seed": seed, column: value}
        for variant, values in variants.items()
        for seed, value in enumerate(values)
    ]


def sentences(rows, column=ACCURACY, pair=PAIR, teacher=None, chance=None):
    teachers = {"teacher": teacher} if teacher else {}
    return conclusions(rows, column, pair, teachers=teachers, chance=chance or {})


def test_the_interval_against_a_constant_is_that_of_student_s_t():
    low, high = welch_interval([1.0, 2.0, 3.0], [0.0, 0.0])

    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert summarize([1.0]) == {"mean": 1.0, "sd": None}


def test_the_interval_of_a_difference_is_welch_s():
    """Against scipy, and with equal variances and numbers against the pooled t of 2n - 2 degrees."""
    first, second = [0.6, 0.63, 0.61, 0.7], [0.5, 0.52]
    of_scipy = ttest_ind(first, second, equal_var=False).confidence_interval()

    assert welch_interval(first, second) == pytest.approx((of_scipy.low, of_scipy.high))
    half = 2.776445 * (2 / 3) ** 0.5
    assert welch_interval([1, 2, 3], [6, 7, 8]) == pytest.approx((-5 - half, -5 + half))
    assert welch_interval([1, 2, 3], [2, 1, 3]) == welch_interval([1, 2, 3], [1, 2, 3])
    assert welch_interval([1.0], [2.0, 3.0]) is None
    assert welch_interval([2.0, 2.0], [1.0, 1.0]) == (1, 1)


def test_a_lead_whose_interval_excludes_zero_is_stated_with_its_size():
    rows = rows_of(labels=(0.20, 0.22, 0.21), kd=(0.50, 0.52, 0.51), e2kd=(0.60, 0.63, 0.61))

    best, levels = sentences(rows, teacher={"accuracy": 0.9}, chance={"accuracy": 0.1})

    assert best.startswith(
        "e2kd has the highest mean accuracy, 61.3 %: +10.3 points on average (95 % interval "
    )
    assert (
        "3 seeds) against kd, the second best. This interval does not account for the choice among 3 variants."
        in best
    )
    assert levels == "The teacher has 90.0 % and the most frequent class has 10.0 %."


def test_a_variant_that_is_not_clearly_better_than_chance_is_remarked_on():
    rows = rows_of(kd=(0.03, 0.04), e2kd=(0.5, 0.6), at=(0.15, 0.2), fitnet=(0.125, 0.125))

    remarks = chance_remarks(rows, ACCURACY, ChanceLimit(level=0.125, highest=0.18))

    assert remarks == {
        "kd": "below the most frequent class",
        "at": "not clearly above the most frequent class",
        "fitnet": "not clearly above the most frequent class",
    }
    limit, good, weak = ChanceLimit(0.125, 0.18), {"accuracy": 0.9}, {"accuracy": 0.15}
    below, near = remarks_in_words(remarks, ACCURACY, {"teacher": good}, limit)
    assert below.startswith(
        "The accuracy of kd is below the most frequent class, so look at what was trained"
    )
    assert near.startswith(
        "The accuracy of at, fitnet is not clearly above the most frequent class"
    )
    below, _ = remarks_in_words(remarks, ACCURACY, {"teacher": weak}, limit)
    assert "so look at the teacher, whose accuracy is not clearly above it either, before" in below


def test_the_limit_of_chance_is_two_standard_errors_above_it():
    metrics = {"test": {"records": 100, "accuracy": 0.15, "majority_accuracy": 0.1, "epg": 0.3}}
    result = StudentResult(
        variant="kd", label="kd", seed=0, folder=Path("nowhere"), metrics=metrics
    )
    epg = Column(name="epg", source="test.epg")

    column, limit = accuracy_limit([result], [epg, ACCURACY])

    assert column is ACCURACY
    assert limit == pytest.approx((0.1, 0.1 + 2 * 0.03))
    assert accuracy_limit([result], [epg]) is None


def test_a_lead_within_the_noise_is_not_conclusive():
    (best,) = sentences(rows_of(kd=(0.5, 0.6, 0.4), e2kd=(0.6, 0.5, 0.5)))

    assert "its lead over kd is not conclusive: +3.3 points on average (95 % interval -" in best


def test_one_seed_is_not_conclusive_however_large_the_lead():
    (best,) = sentences(rows_of(kd=(0.1,), e2kd=(0.9,)))

    opening, _, reason = best.partition(", before kd, ")
    assert opening == "e2kd has the highest mean accuracy, 90.0 %"
    assert reason == "but the order is not conclusive (1 seed: no spread known)."


def test_equal_means_have_no_order():
    (best,) = sentences(rows_of(kd=(0.5,), e2kd=(0.5,)))

    assert best == "kd and e2kd have the same mean accuracy, 50.0 %."


def test_variants_without_a_common_seed_are_compared():
    rows = [
        *rows_of(kd=(0.5, 0.52, 0.51)),
        *(
            {"method": "e2kd", "seed": seed, "accuracy": value}
            for seed, value in ((7, 0.6), (8, 0.62))
        ),
    ]

    (best,) = sentences(rows)

    assert best.startswith(
        "e2kd has the highest mean accuracy, 61.0 %: +10.0 points on average (95 % interval "
    )
    assert "2 and 3 seeds) against kd" in best
    assert leading_variants(rows, "accuracy", higher_is_better=True) == {"e2kd"}


def test_equal_values_are_a_spread_that_is_not_known():
    kd, e2kd = (0.60, 0.60), (0.61, 0.61)

    (best,) = sentences(rows_of(kd=kd, e2kd=e2kd))

    assert not excludes_zero(welch_interval(e2kd, kd))
    assert not excludes_zero((0.01, 0.01))
    assert excludes_zero((0.009, 0.011))
    assert best == (
        "e2kd has the highest mean accuracy, 61.0 %, but its lead over kd is not conclusive: +1.0 points, with equal "
        "values for all of 2 seeds, so no spread is known."
    )


def test_the_pair_has_its_own_sentence_if_it_is_not_the_two_best():
    rows = rows_of(labels=(0.9, 0.9), kd=(0.5, 0.5), e2kd=(0.6, 0.7))

    _, pair = sentences(rows)

    assert "e2kd - kd in accuracy: +15.0 points on average" in pair
    assert pair.endswith(", which is not conclusive.")


def test_where_lower_is_better_the_lowest_is_best():
    (best,) = sentences(rows_of("kl", kd=(0.5, 0.51, 0.5), e2kd=(0.2, 0.22, 0.2)), KL)

    assert best.startswith("e2kd has the lowest mean kl, 0.207: -0.297 on average")


def test_a_student_alone_is_compared_with_nobody():
    (alone,) = sentences(rows_of(photos=(0.63,)))

    assert (
        alone
        == "photos: accuracy 63.0 % (1 seed: no spread known), without another variant to compare it with."
    )


def test_a_difference_of_one_seed_has_no_interval():
    one = variant_difference(rows_of(kd=(0.1,), e2kd=(0.3,)), *PAIR, "accuracy")
    two = variant_difference(rows_of(kd=(0.1, 0.1), e2kd=(0.3, 0.2)), *PAIR, "accuracy")

    assert (one["interval"], one["seeds"]) == (None, [1, 1])
    assert two["interval"][0] < two["mean"] < two["interval"][1]
    with pytest.raises(ConfigError, match=r"report\.baseline=at is not a variant of this run"):
        variant_difference(rows_of(kd=(0.1,)), "kd", "at", "accuracy")
    with pytest.raises(ConfigError, match=r"candidate and report\.baseline are both kd"):
        variant_difference(rows_of(kd=(0.1, 0.2)), "kd", "kd", "accuracy")


def test_every_variant_is_compared_with_the_baseline_one_of_one_seed_without_an_interval():
    rows = rows_of(kd=(0.5, 0.4), labels=(0.3, 0.3), e2kd=(0.6, 0.7), alone=(0.9,))

    found = differences_by_column(rows, "kd", {}, ["accuracy"])["accuracy"]

    assert set(found) == {"labels", "e2kd", "alone"}
    mean = pytest.approx(0.45)
    assert found["alone"] == {"mean": mean, "interval": None, "seeds": [1, 2], "images": 0}
    assert found["e2kd"] == variant_difference(rows, "e2kd", "kd", "accuracy")
    assert found["labels"]["mean"] == pytest.approx(-0.15)
    assert differences_by_column(rows, "at", {}, ["accuracy"]) == {}


def test_a_variant_may_have_a_baseline_of_its_own():
    rows = rows_of(kd=(0.5, 0.4), e2kd=(0.6, 0.7), kd_200=(0.8, 0.8), e2kd_200=(0.7, 0.9))
    own = {"e2kd_200": "kd_200", "kd_200": "kd_200"}

    found = differences_by_column(rows, "kd", own, ["accuracy"])["accuracy"]

    assert set(found) == {"e2kd", "e2kd_200"}
    assert found["e2kd_200"] == variant_difference(rows, "e2kd_200", "kd_200", "accuracy")
    with pytest.raises(ConfigError, match=r"report\.baselines=\{e2kd: gone\} names no variant"):
        differences_by_column(rows, "kd", {"e2kd": "gone"}, ["accuracy"])


@pytest.mark.parametrize("right", [0, 25, 37])
def test_the_interval_of_one_student_is_wilson_s(right):
    images = np.arange(37) < right
    of_scipy = binomtest(right, 37).proportion_ci(method="wilson")

    assert accuracy_interval(images[None] * 1.0) == pytest.approx((of_scipy.low, of_scipy.high))
    same = accuracy_interval(np.tile(images, (3, 1)) * 1.0)
    assert same == pytest.approx((of_scipy.low, of_scipy.high))


def test_the_interval_over_images_and_seeds_covers_the_accuracy_and_the_one_over_seeds_does_not():
    draws = np.random.default_rng(0)
    over_images, over_seeds = 0, 0
    for _ in range(300):  # logits of images and of seeds, crossed
        logits = draws.normal(0, 2, 40) + draws.normal(0, 0.1, (4, 1))
        right = (draws.random((4, 40)) < 1 / (1 + np.exp(-logits))) * 1.0
        low, high = accuracy_interval(right)
        over_images += low <= 0.5 <= high
        low, high = welch_interval(right.mean(axis=1).tolist(), [0.0, 0.0])
        over_seeds += low <= 0.5 <= high

    assert over_images >= 0.93 * 300
    assert over_seeds < 0.85 * 300


def scored_rows(**variants):
    """Rows of students from the images that each got right."""
    means = {variant: np.mean(students, axis=1) for variant, students in variants.items()}
    rows = [ScoredRow(row) for row in rows_of(**means)]
    for row in rows:
        right = variants[row["method"]][row["seed"]]
        row.right = {"accuracy": dict(zip("abcdefgh", map(bool, right), strict=False))}
    return rows


def test_a_difference_is_paired_over_images():
    kd, e2kd = [(1, 0, 0, 0), (0, 1, 0, 0)], [(1, 1, 0, 0), (1, 1, 1, 0)]

    found = variant_difference(scored_rows(kd=kd, e2kd=e2kd), *PAIR, "accuracy")

    gains = np.mean(e2kd, axis=0) - np.mean(kd, axis=0)
    assert found["interval"] == list(welch_interval([0.5, 0.75], [0.25, 0.25], gains.var() / 4))
    assert found["images"] == 4
    # The same images, in which nothing differs, add nothing.
    assert variant_difference(scored_rows(kd=kd, e2kd=kd), *PAIR, "accuracy")["interval"] == [0, 0]


def test_seeds_that_agree_do_not_settle_a_difference_of_few_images():
    few = scored_rows(kd=[(1, 1, 0, 0, 0)] * 2, e2kd=[(1, 1, 1, 0, 0)] * 2)

    (best,) = sentences(few)

    assert "its lead over kd is not conclusive: +20.0 points on average" in best
    assert best.endswith("by Welch's t, 2 seeds, 5 images).")
    others = scored_rows(kd=[(1, 0)] * 2, e2kd=[(1, 1, 0)] * 2)
    assert variant_difference(others, *PAIR, "accuracy")["images"] == 0


def shipped(rows, selection=None):
    students = []
    for row in rows:
        name, metrics = row["method"], {"test": {"records": 10, "accuracy": row["accuracy"]}}
        of_row = {"variant": name, "label": name, "seed": row["seed"], "folder": Path("nowhere")}
        run = f"{name}-{row['seed']}"
        students.append(StudentResult(**of_row, run=run, metrics=metrics))
    student, reason = student_to_ship(rows, students, ACCURACY, selection)
    return student.run, reason


def test_the_student_to_ship_is_the_best_seed_of_the_best_variant():
    clear = rows_of(kd=(0.5, 0.52, 0.51), e2kd=(0.6, 0.63, 0.61))

    run, reason = shipped(rows_of(kd=(0.5, 0.9), e2kd=(0.6, 0.7)))

    assert run == "kd-1"
    assert ", but its lead over e2kd is not conclusive. Of its students, seed 1 has" in reason
    assert shipped(clear)[1].startswith("e2kd has the best accuracy. Of its")
    assert shipped(rows_of(kd=(0.5,))) == ("kd-0", "kd has the best accuracy.")
    runs = {"values": [0.9, 0.8], "runs": ("kd-0", "kd-1")}
    selected = Candidate(variant="kd", point={}, chosen=True, **runs)
    selection = ModelSelection(select="val.accuracy", candidates=[selected])
    assert shipped(rows_of(kd=(0.5, 0.6)), selection)[0] == "kd-0"
    assert student_to_ship(clear, [], ACCURACY, None) is None


def test_an_accuracy_that_was_not_measured_has_a_reason():
    assert "its network has 6 outputs" in unmeasured_accuracy({"outputs": 6}, ["kd"], 7)
    assert "no evaluated record has a label" in unmeasured_accuracy({}, ["kd"], 7)
