"""Options of single judges: sections of `evaluate`, each named after its judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.core.errors import require

Compared = Literal["teacher", "student", "baseline"]
"""Networks whose features are compared. The student is who is judged; the baseline is another run's student."""


def check_pairs(option: str, pairs: tuple[tuple[str, str], ...], baseline: str | None) -> None:
    """ConfigError unless each pair [x, given] names two networks, and a baseline where one is wanted."""
    for one, given in pairs:
        require(one != given, f"{option} compares {one} with itself; name two networks, [x, given]")
    require(
        baseline is not None or all("baseline" not in pair for pair in pairs),
        f"{option} names baseline, which is another run's student: set its name beside it, as in "
        f"{option.rpartition('.')[0]}.baseline=kd-student",
    )


def wanted_pairs(
    pairs: tuple[tuple[Compared, Compared], ...], baseline: str | None
) -> tuple[tuple[Compared, Compared], ...]:
    """The pairs (x, given) of an option: where it is empty what is left of the teacher, and of the student beyond it;
    with a baseline what the student learned beyond that, and what it lost of it.
    """
    if pairs:
        return pairs
    both: tuple[tuple[Compared, Compared], ...] = (("teacher", "student"), ("student", "teacher"))
    return (*both, ("student", "baseline"), ("baseline", "student")) if baseline else both


@dataclass(frozen=True, kw_only=True)
class DistanceCorrelationOptions:
    """Distilled and residual features (UniCAM): FSS and RS by layer, on a fixed set of records."""

    probe_records: int = 512
    """Of each split, balanced over classes; fewer where it has fewer. A block with room for fewer than 4 records of
    each class takes 4 each of classes that are drawn: with 1,000 classes 4,000 in one block show all. All of a layer's
    features of a block lie in memory at once: 1.6 GB for the largest layer of a ResNet-50 at 224 pixels and 512
    records."""
    seed: int = 0
    """Draws them; it has nothing to do with the run's."""
    block_records: int = 512
    """More are compared in blocks of about as many, >= 64, whose inner products are summed."""
    layers: dict[str, str] = field(default_factory=dict)
    """The student's layer -> the teacher's: layer1, layer2, ... (the stages) and pooled (the last one's average), or
    features and pooled, or logits, whichever a network shows; empty pairs them from the deepest."""
    pairs: tuple[tuple[Compared, Compared], ...] = ()
    """[x, given] of RS: of teacher, student and baseline what is left of x without given. Empty: [teacher, student]
    and [student, teacher], and with a baseline [student, baseline] and [baseline, student]."""
    baseline: str | None = None
    """Run of another student, as one of labels alone: what the student has beyond it was distilled. In a sweep it may
    name an arm, whose student of the same seed is taken."""
    permutations: int = 999
    """Of the labels, >= 19, for the p-values of relevance and RS; the smallest is 1 / (permutations + 1)."""
    embeddings: str | None = None
    """.npy [K, e], an embedding a class, as of their names; null: one-hot. For two classes any gives the same."""
    l2norm: bool = False
    """Divide each record's features by their length, as the released code does for FSS."""
    biased: bool = False
    """Also fss_biased, the V-statistic of the released code on such features: for parity, as it goes to 1 for any two
    networks where features are many and records few."""

    def __post_init__(self) -> None:
        section = "evaluate.distance_correlation"
        require(
            self.probe_records >= 4,
            f"{section}.probe_records must be >= 4 (below, no unbiased estimate exists), got {self.probe_records}",
        )
        require(
            self.block_records >= 64,
            f"{section}.block_records must be >= 64, got {self.block_records}",
        )
        require(
            self.permutations >= 19,
            f"{section}.permutations must be >= 19 (for a p of 0.05), got {self.permutations}",
        )
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)


@dataclass(frozen=True, kw_only=True)
class UnicamOptions:
    """Maps of distilled and residual features (UniCAM), each record against fixed banks of others."""

    records: int = 8
    """Explained, of each split, balanced over classes."""
    bank_records: int = 255
    """Of each bank, balanced over classes; fewer where a split has not as many for all banks. A bank with room for
    fewer than 4 records of each class takes 4 each of classes that are drawn, and records of these are explained."""
    banks: int = 2
    """R; a map is the mean over them, and its reliability how much they agree."""
    seed: int = 0
    """Draws records and banks; it has nothing to do with the run's."""
    depths: tuple[int, ...] = (1,)
    """1 compares pooled features, 2 the last stage's at all places, 3 those of the stage before it, and so on. A
    bank's features of all depths lie in memory at once."""
    reductions: tuple[Literal["cam", "hirescam"], ...] = ("cam", "hirescam")
    """At depth 1 they are the same but for rounding."""
    pairs: tuple[tuple[Compared, Compared], ...] = ()
    """[x, given]: what of x's relevance to the labels lies beyond given, on x's grid. Empty: [teacher, student]
    (residual) and [student, teacher], and with a baseline [student, baseline] (distilled) and the reverse."""
    baseline: str | None = None
    """Run (in a sweep also arm) of another student, as one of labels alone."""

    def __post_init__(self) -> None:
        section = "evaluate.unicam"
        for name in ("records", "banks"):
            require(
                getattr(self, name) >= 1,
                f"{section}.{name} must be >= 1, got {getattr(self, name)}",
            )
        require(
            self.bank_records >= 4, f"{section}.bank_records must be >= 4, got {self.bank_records}"
        )
        for name in ("depths", "reductions"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"{section}.{name} must name at least one, each once, got {list(values)}",
            )
        require(min(self.depths) >= 1, f"{section}.depths must be >= 1, got {list(self.depths)}")
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)
