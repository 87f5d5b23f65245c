"""Accuracies that were measured for a number of stored bytes: what to store within a budget.

CIFAR-10 with 50 images per class, ResNet-20 students of a ResNet-56, no labels (docs/results/index.md). A test compares
the points with the committed results.
"""

from __future__ import annotations

from typing import NamedTuple


class MeasuredPoint(NamedTuple):
    """Targets whose students have a higher mean accuracy than those of all smaller ones."""

    bytes: int
    """Bytes per image."""
    stored: str
    """Targets that are stored with the logits."""
    method: str
    accuracy: float
    """Test accuracy in per cent, a mean over students."""


POINTS = (
    MeasuredPoint(20, "logits alone", "kd", 48.6),
    MeasuredPoint(140, "class maps of 2x2 cells", "cat_kd", 54.5),
    MeasuredPoint(1380, "maps of all classes", "e2kd", 56.1),
    MeasuredPoint(1428, "features of the last stage, 4x4 cells", "features", 58.0),
    MeasuredPoint(2388, "features of all stages, 4x4 cells", "features", 59.1),
    MeasuredPoint(25393, "features of all stages", "features", 63.2),
    MeasuredPoint(50718, "features of all stages, also flipped", "features", 69.1),
)
"""Points in the order of their bytes, without those of a few bytes less than the next one."""


def describe_nearest(budget: float) -> str:
    """Describe the best measured point within about a budget.

    Args:
        budget: Bytes per image; a third more is within it, as networks and images differ.
    """
    within = [point for point in POINTS if point.bytes <= budget * 4 / 3] or [POINTS[0]]
    best, first = within[-1], POINTS[0]
    others = "" if best is first else f", logits alone {first.accuracy:g} %"
    return (
        f"within about {budget:,.0f} bytes per record, {best.stored} ({best.bytes:,} bytes, method={best.method}) "
        f"taught most: {best.accuracy:g} %{others} (CIFAR-10, 500 images, ResNet-56 to ResNet-20)"
    )
