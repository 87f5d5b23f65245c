"""Options of UniCAM, and of FSS and RS by distance correlation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from permafrost.config.evaluation import EVALUATORS, EvaluatorOptions
from permafrost.config.options import Role
from permafrost.core.errors import require

Compared = Literal["teacher", "student", "baseline"]
"""Networks whose features are compared: the evaluated student, its teacher, or another run's student
(baseline)."""


def wanted_pairs(
    pairs: tuple[tuple[Compared, Compared], ...], baseline: str | None
) -> tuple[tuple[Compared, Compared], ...]:
    """Return the pairs (x, given) of an option, or the default pairs if it is empty.

    The defaults are what the teacher has beyond the student and the reverse. With a baseline they also include what the
    student has beyond the baseline and the reverse.
    """
    if pairs:
        return pairs
    both: tuple[tuple[Compared, Compared], ...] = (("teacher", "student"), ("student", "teacher"))
    return (*both, ("student", "baseline"), ("baseline", "student")) if baseline else both


@dataclass(frozen=True, kw_only=True)
class ComparedFeaturesOptions(EvaluatorOptions):
    """Options of every comparison of the features of networks."""

    uses_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False

    seed: int = 0
    """Seed of the choice of records, independent of the run's seed."""
    embeddings: Annotated[str | None, Role.FILE] = None
    """File of class embeddings (.npy, [K, e]), for example of the class names; null: one-hot. For two classes
    the choice makes no difference."""
    prototypes: str | None = None
    """Pass of the store whose output pooled takes the place of class embeddings, as its mean over the records of each
    class, for example of CLIP's image encoder. null: none."""
    prototypes_split: str = "train"
    """Split of these records: the labeled ones that the pass covers and that are not evaluated."""
    pairs: tuple[tuple[Compared, Compared], ...] = ()
    """Pairs [x, given], out of teacher, student and baseline: what x has beyond given. Empty: [teacher, student]
    (residual) and [student, teacher], and with a baseline also [student, baseline] (distilled) and [baseline,
    student]."""
    baseline: str | None = None
    """Run of another student, such as one trained on labels only; what the student has beyond it was distilled.
    In a sweep it may name a variant, whose student with the same seed is used."""

    @property
    def is_one_hot(self) -> bool:
        """True if classes are all equally far apart."""
        return self.embeddings is None and self.prototypes is None

    def _check_together(self) -> None:
        require(
            self.embeddings is None or self.prototypes is None,
            f"{self.section}.embeddings={self.embeddings} and {self.section}.prototypes={self.prototypes} both say how "
            "similar classes are; set one of them to null",
        )
        for one, given in self.pairs:
            require(
                one != given,
                f"{self.section}.pairs compares {one} with itself; name two different networks, [x, given]",
            )
        require(
            self.baseline is not None or all("baseline" not in pair for pair in self.pairs),
            f"{self.section}.pairs names baseline, which is another run's student; also set that run, as in "
            f"{self.section}.baseline=kd-student",
        )


def compared_networks(options: ComparedFeaturesOptions) -> list[str]:
    """Return the networks that the pairs name, each once."""
    return list(dict.fromkeys(chain(*wanted_pairs(options.pairs, options.baseline))))


@dataclass(frozen=True, kw_only=True)
class DistanceCorrelationOptions(ComparedFeaturesOptions):
    """Distilled and residual features (UniCAM): FSS and RS by layer, on a fixed set of records."""

    section: ClassVar[str] = "evaluate.distance_correlation"
    implementation: ClassVar[str] = "permafrost_papers.unicam.distance_correlation:EVALUATOR"

    probe_records: Annotated[int, Ge(4)] = 512
    """Records per split, balanced over classes; fewer if a split has fewer. A block too small for 4 records of
    every class contains 4 records each of some randomly drawn classes. With 1,000 classes, one block of 4,000
    records covers all. All features of one layer in a block are held in memory: 1.6 GB for the largest layer of
    a ResNet-50 at 224 pixels and 512 records."""
    block_records: Annotated[int, Ge(64)] = 512
    """Records per block. A larger set is compared in blocks of about this size, whose inner products are
    summed."""
    layers: dict[str, str] = field(default_factory=dict)
    """Mapping from the student's layers to the teacher's; empty pairs them from the deepest. Names: layer1,
    layer2, ... (the stages) and pooled (the average of the last stage), or features and pooled, or logits,
    depending on the network."""
    permutations: Annotated[int, Ge(19)] = 999
    """Permutations of the labels for the p-values of relevance and RS; the smallest p-value is 1 /
    (permutations + 1)."""
    l2norm: bool = False
    """Divide each record's features by their L2 norm, as the released code does for FSS."""
    biased: bool = False
    """Also compute fss_biased, the V-statistic of the released code on such features, for parity. It approaches
    1 for any two networks if there are many features and few records."""


@dataclass(frozen=True, kw_only=True)
class UnicamOptions(ComparedFeaturesOptions):
    """Maps of distilled and residual features (UniCAM), of each record against fixed banks of others."""

    section: ClassVar[str] = "evaluate.unicam"
    implementation: ClassVar[str] = "permafrost_papers.unicam.residual_maps:EVALUATOR"

    records: Annotated[int, Ge(1)] = 8
    """Explained records per split, balanced over classes."""
    bank_records: Annotated[int, Ge(4)] = 255
    """Records per bank, balanced over classes; fewer if a split has too few for all banks. A bank too small for
    4 records of every class contains 4 records each of some randomly drawn classes, and records of these
    classes are explained."""
    banks: Annotated[int, Ge(1)] = 2
    """Number of banks R; a map is the mean over them, and its reliability is how well they agree."""
    depths: tuple[int, ...] = (1,)
    """Depths to compare: 1 the pooled features, 2 the last stage at all positions, 3 the stage before it, and
    so on. With several depths there is also a map of their mean. The features of a bank at all depths are held
    in memory together."""
    reductions: tuple[Literal["cam", "hirescam"], ...] = ("cam", "hirescam")
    """Reductions of the gradient to a map; at depth 1 they are equal up to rounding."""
    overlays: bool = False
    """Also write a PNG file for each explained record and pair, unicam-<split>/<x>_given_<y>/<key>.png: the map of the
    first reduction over the image, as the mean of several depths. Red increases the relevance to the labels."""

    def _check_together(self) -> None:
        super()._check_together()
        for name in ("depths", "reductions"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"{self.section}.{name} must list at least one value, each once, got {list(values)}",
            )
        require(
            min(self.depths) >= 1, f"{self.section}.depths must be >= 1, got {list(self.depths)}"
        )


EVALUATORS.update({"distance_correlation": DistanceCorrelationOptions, "unicam": UnicamOptions})
