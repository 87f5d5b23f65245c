"""The points that an estimate names are the best ones of the committed results."""

from statistics import fmean

import pytest

from docs.tables.frontier import POINTS as COMMITTED
from permafrost_estimate.measured_points import POINTS, describe_nearest


def test_the_points_are_the_best_of_the_committed_results():
    best, accuracy = [], 0.0
    for point in COMMITTED:
        mean = round(100 * fmean(run["accuracy"] for run in point.runs) + 1e-9, 1)
        if mean > accuracy:
            accuracy = mean
            best.append((round(point.bytes), point.stored, point.method, mean))

    known = [tuple(point) for point in POINTS]
    assert set(known) <= set(best)
    for missing in set(best) - set(known):  # a few points less than the next one, for as many bytes
        _, _, _, later = next(point for point in known if point[0] > missing[0])
        assert later > missing[3]
        assert missing[0] > 1000


@pytest.mark.parametrize(
    ("budget", "stored"),
    [
        (5, "logits alone"),
        (20, "logits alone"),
        (200, "class maps of 2x2 cells"),
        (2_000, "features of all stages, 4x4 cells"),
        (20_000, "features of all stages (25,393 bytes"),
        (1e6, "also flipped"),
    ],
)
def test_the_best_point_within_a_budget_is_named(budget, stored):
    assert stored in describe_nearest(budget)
