"""Choice of the records that are shown case by case, from hand-written tables."""

from __future__ import annotations

import pytest

from permafrost_report.cases import choose_cases, value_of

NAMES = ("kd", "e2kd")


def row(key, correct, prediction=None, cosine=None, **columns):
    """Row of the table of a record with the single label 3, which the teacher explains."""
    values = {"key": key, "labels": [3], "correct": correct, "predictions": [prediction]}
    return values | {"epg": [None], "classes": [3], "map_cosine": [cosine]} | columns


def chosen_cases(baseline, candidate, num_cases=8, **options):
    choice = choose_cases(baseline, candidate, NAMES, num_cases, **{"many": False} | options)
    return {
        kind.title: (kind.found, [(case.key, case.label) for case in kind.cases])
        for kind in choice.kinds
    }


def test_cases_are_shown_from_both_sides_and_begin_where_the_maps_differ_most():
    # key: (baseline correct, its prediction, its cosine), (candidate correct, ...)
    records = {
        "a": ((False, 1, 0.50), (True, 3, 0.60)),
        "b": ((False, 1, 0.25), (True, 3, 0.75)),
        "c": ((False, 1, None), (True, 3, 0.99)),  # without a map, so it comes last
        "d": ((True, 3, 0.50), (False, 2, 0.75)),
        "e": ((True, 3, 0.75), (False, 2, 0.50)),
        "f": ((True, 3, 0.75), (True, 3, 0.25)),
        "g": ((False, 1, 0.50), (False, 1, 0.75)),
        "h": ((False, 1, 0.50), (False, 2, 0.75)),  # both wrong, with different predictions
    }
    baseline, candidate = ([row(k, *v[n]) for k, v in records.items()] for n in (0, 1))

    shown = chosen_cases(baseline, candidate)

    assert shown == {
        "e2kd right, kd wrong": (3, [("b", 3), ("a", 3), ("c", 3)]),
        "kd right, e2kd wrong": (2, [("e", 3), ("d", 3)]),
        "e2kd and kd agree": (2, [("f", 3), ("g", 3)]),
    }
    assert chosen_cases(baseline[::-1], candidate[::-1]) == shown


@pytest.mark.parametrize(
    ("num_cases", "of_each"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (4, [2, 1, 1]), (8, [4, 2, 2])]
)
def test_half_of_the_cases_speak_for_the_candidate(num_cases, of_each):
    truths = [(False, True), (True, False), (True, True)] * 6
    baseline, candidate = (
        [row(f"{n:02}", t[who], 3 if t[who] else 0, 0.5) for n, t in enumerate(truths)]
        for who in (0, 1)
    )

    shown = chosen_cases(baseline, candidate, num_cases)

    assert [len(cases) for _, cases in shown.values()] == of_each
    # The cases of a kind differ only in their keys.
    firsts = [
        [(f"{kind + 3 * n:02}", 3) for n in range(count)] for kind, count in enumerate(of_each)
    ]
    assert [cases for _, cases in shown.values()] == firsts


def test_without_a_teacher_s_maps_epg_orders_and_without_regions_the_keys():
    nothing = {"map_cosine": [None]}
    baseline = [row(key, False, 0, epg=[0.5], **nothing) for key in "ab"]
    better = [row(k, True, 3, epg=[e], **nothing) for k, e in zip("ab", (0.6, 0.7), strict=True)]
    blind = [row(key, True, 3, **nothing) for key in "ab"]

    assert chosen_cases(baseline, better)["e2kd right, kd wrong"][1] == [("b", 3), ("a", 3)]
    assert chosen_cases(baseline, blind)["e2kd right, kd wrong"][1] == [("a", 3), ("b", 3)]
    assert chosen_cases(baseline, blind)["e2kd and kd agree"] == (0, [])


def test_a_record_whose_label_is_not_known_is_no_case():
    assert chosen_cases([row("a", None, 1, 0.1)], [row("a", None, 1, 0.9)]) == {
        "e2kd right, kd wrong": (0, []),
        "kd right, e2kd wrong": (0, []),
        "e2kd and kd agree": (0, []),
    }


def test_of_many_labels_every_class_with_a_region_is_a_case():
    def many(key, labels, epg):
        classes = {"labels": labels, "classes": labels}
        return {"key": key, "epg": epg, "correct": False, "predictions": [], **classes}

    baseline = [
        many("a", [0, 2], [0.2, 0.5]),
        many("b", [1, 2], [0.5, None]),
        many("c", [0], [0.5]),
    ]
    candidate = [
        many("a", [0, 2], [0.4, 0.1]),
        many("b", [1, 2], [0.9, 0.9]),
        many("c", [0], [0.5]),
    ]

    shown = chosen_cases(baseline, candidate, 4, many=True)

    assert shown == {
        "EPG: e2kd above kd": (2, [("b", 1), ("a", 0)]),
        "EPG: kd above e2kd": (1, [("a", 2)]),
    }


def test_a_value_is_that_of_the_asked_class():
    values = row(
        "a", True, 3, labels=[3, 5], classes=[3, 5], epg=[0.1, None], map_cosine=[0.9, 0.7]
    )

    assert value_of(values, "epg", 3) == 0.1
    assert value_of(values, "epg", 5) is None
    assert value_of(values, "map_cosine", 3) == 0.9
    assert value_of(values, "map_cosine", 4) is None
