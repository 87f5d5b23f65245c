"""Tables of UniCAM: features, maps and scores through five depths, and a teacher assistant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docs.cells import Rows, difference, spread, table
from docs.measured import runs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UNICAM = "unicam/cifar10_small"
UNICAM_VARIANTS = {
    "labels": "labels",
    "vanilla": "logits (vanilla KD)",
    "feature": "features (factor transfer)",
    "attention": "attention (AT)",
    "other_seed": "labels, against labels of another seed",
}
UNICAM_COMPARED = [variant for variant in UNICAM_VARIANTS if variant != "labels"]
"""Students that are compared with a baseline."""
DEPTHS = [f"depth{depth}" for depth in range(1, 6)]


def unicam_students() -> str:
    """Students of CIFAR-10 by what they learned from, at depth 1."""
    rows: Rows = []
    for variant, label in UNICAM_VARIANTS.items():
        if variant == "other_seed":
            continue
        runs = runs_of(UNICAM, variant)
        cells = [spread(runs, "accuracy"), spread(runs, "agreement")]
        cells += [
            spread(runs, f"{name}_depth1", 1, 2)
            for name in ("fss", "relevance", "residual", "beyond_teacher")
        ]
        rows.append((label, [*cells, difference(runs, runs_of(UNICAM, "labels"))]))
    header = ("", "test accuracy, %", "agreement, %", "FSS", "relevance", "RS, teacher only")
    return table((*header, "RS, student only", "accuracy, difference from labels"), rows)


def _by_depth(names: Mapping[str, str], variants: Sequence[str], depths: Sequence[str]) -> str:
    rows: Rows = [
        (
            f"{title}: {UNICAM_VARIANTS[variant]}",
            [spread(runs_of(UNICAM, variant), f"{name}_{depth}", 1, 2) for depth in depths],
        )
        for name, title in names.items()
        for variant in variants
    ]
    return table(("", *(depth.replace("depth", "depth ") for depth in depths)), rows)


def unicam_depths() -> str:
    """FSS and RS through five depths."""
    parts = [
        _by_depth(
            {"fss": "FSS"},
            [variant for variant in UNICAM_VARIANTS if variant != "other_seed"],
            DEPTHS,
        ),
        _by_depth({"distilled": "distilled", "lost": "lost"}, UNICAM_COMPARED, DEPTHS),
    ]
    return "\n".join(parts)


def unicam_maps() -> str:
    """Cosine of the maps between two banks, through five depths and for their mean."""
    names = {"map_distilled": "distilled", "map_residual": "residual"}
    return _by_depth(names, UNICAM_COMPARED, [*DEPTHS, "mean"])


def cifar10_assistant() -> str:
    """Students of the first teacher and of its assistant, compared with the first teacher."""
    variants = {
        "labels": "labels",
        "by_teacher": "KD from the first teacher (ResNet-56)",
        "by_assistant": "KD from the assistant (ResNet-20)",
    }
    rows: Rows = []
    for variant, label in variants.items():
        runs = runs_of("unicam/cifar10_assistant", variant)
        own = [spread(runs, "accuracy"), spread(runs, "agreement")]
        own += [spread(runs, name, 1, 3) for name in ("fss", "left_of_teacher")]
        rows.append(
            (label, [*own, difference(runs, runs_of("unicam/cifar10_assistant", "by_teacher"))])
        )
    header = ("compared with the ResNet-56", "test accuracy, %", "agreement, %", "FSS")
    return table((*header, "RS, teacher only", "accuracy, difference from the second row"), rows)


TABLES = (unicam_students, unicam_depths, unicam_maps, cifar10_assistant)
