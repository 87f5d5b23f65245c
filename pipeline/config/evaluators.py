"""Evaluators and their options: each that has any has a section of `evaluate` named after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from pipeline.config.options import Options, Role
from pipeline.core.errors import require

Compared = Literal["teacher", "student", "baseline"]
"""Networks whose features are compared. The student is who is evaluated; the baseline is another run's student."""


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
class EvaluatorOptions(Options):
    """The base of an evaluator's options, and of one that has none."""

    is_flat: ClassVar[bool] = False
    """Whether its metrics stand beside `records` in metrics.json, rather than below its name."""
    uses_teacher: ClassVar[bool] = False
    """Whether it may run the teacher network itself; for all others `teacher` is not read."""
    compares: ClassVar[bool] = False
    """Whether it compares with another run, which its option `baseline` names."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(EvaluatorOptions):
    """Accuracy, by group too, and agreement with the teacher."""

    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.accuracy:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LocalizationOptions(EvaluatorOptions):
    """EPG and IoU of explanations, and their cosine with the teacher's stored maps."""

    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.localization:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(EvaluatorOptions):
    """The shift-equivariance curve of the student's explanation (e2KD, Figure 5)."""

    section: ClassVar[str] = "evaluate.shift"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.shift:EVALUATOR"

    pixels: Annotated[int | None, Ge(1)] = None
    """Pixels up to which the input is shifted (in the paper 32); null measures none. Wants frames that are larger than
    the student's input by as much."""
    records: Annotated[int, Ge(1)] = 256
    """Of each split; every shift is a forward pass of each."""


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesOptions(EvaluatorOptions):
    """Agreement with the teacher, superfeature by superfeature (KED)."""

    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.superfeatures:EVALUATOR"


@dataclass(frozen=True, kw_only=True)
class DistanceCorrelationOptions(EvaluatorOptions):
    """Distilled and residual features (UniCAM): FSS and RS by layer, on a fixed set of records."""

    section: ClassVar[str] = "evaluate.distance_correlation"
    implementation: ClassVar[str] = (
        "pipeline.evaluation.evaluators.distance_correlation.evaluator:EVALUATOR"
    )
    uses_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    probe_records: Annotated[int, Ge(4)] = 512
    """Of each split, balanced over classes; fewer where it has fewer. A block with room for fewer than 4 records of
    each class takes 4 each of classes that are drawn: with 1,000 classes 4,000 in one block show all. All of a layer's
    features of a block lie in memory at once: 1.6 GB for the largest layer of a ResNet-50 at 224 pixels and 512
    records."""
    seed: int = 0
    """Draws them; it has nothing to do with the run's."""
    block_records: Annotated[int, Ge(64)] = 512
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
    permutations: Annotated[int, Ge(19)] = 999
    """Of the labels, >= 19, for the p-values of relevance and RS; the smallest is 1 / (permutations + 1)."""
    embeddings: Annotated[str | None, Role.FILE] = None
    """.npy [K, e], an embedding a class, as of their names; null: one-hot. For two classes any gives the same."""
    l2norm: bool = False
    """Divide each record's features by their length, as the released code does for FSS."""
    biased: bool = False
    """Also fss_biased, the V-statistic of the released code on such features: for parity, as it goes to 1 for any two
    networks where features are many and records few."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.distance_correlation"
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)


@dataclass(frozen=True, kw_only=True)
class UnicamOptions(EvaluatorOptions):
    """Maps of distilled and residual features (UniCAM), each record against fixed banks of others."""

    section: ClassVar[str] = "evaluate.unicam"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.unicam.evaluator:EVALUATOR"
    uses_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    records: Annotated[int, Ge(1)] = 8
    """Explained, of each split, balanced over classes."""
    bank_records: Annotated[int, Ge(4)] = 255
    """Of each bank, balanced over classes; fewer where a split has not as many for all banks. A bank with room for
    fewer than 4 records of each class takes 4 each of classes that are drawn, and records of these are explained."""
    banks: Annotated[int, Ge(1)] = 2
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
        super().__post_init__()
        section = "evaluate.unicam"
        for name in ("depths", "reductions"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"{section}.{name} must name at least one, each once, got {list(values)}",
            )
        require(min(self.depths) >= 1, f"{section}.depths must be >= 1, got {list(self.depths)}")
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)


@dataclass(frozen=True, kw_only=True)
class GradientAlignmentOptions(EvaluatorOptions):
    """Of evaluators=gradient_alignment."""

    section: ClassVar[str] = "evaluate.gradient_alignment"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.gradient_alignment:EVALUATOR"

    records: Annotated[int, Ge(1)] = 2048
    """Of each split, balanced over classes; two backward passes each."""


@dataclass(frozen=True, kw_only=True)
class ClassSimilarityOptions(EvaluatorOptions):
    """Of evaluators=class_similarity."""

    section: ClassVar[str] = "evaluate.class_similarity"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.class_similarity:EVALUATOR"

    tau: Annotated[float, Gt(0)] = 1.0
    """Temperature of the probabilities."""
    similarity: Annotated[str | None, Role.FILE] = None
    """What else to compare with than the teacher's own class means: a file with a matrix [K, K] (.npy), or of text
    with the superclass of each class in a line, in label order, as the 20 coarse classes of CIFAR-100."""


@dataclass(frozen=True, kw_only=True)
class FiveBandOptions(EvaluatorOptions):
    """Of evaluators=five_band."""

    section: ClassVar[str] = "evaluate.five_band"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.five_band:EVALUATOR"

    thresholds: Literal["legacy", "v2"] = "legacy"
    """Of the soft score: how far thresholds move toward 0. legacy: 11 steps of 0.02, from (0.3, 0.7) to (0.1, 0.5);
    v2: 56 steps of 0.005, to (0.025, 0.425)."""


@dataclass(frozen=True, kw_only=True)
class DissectionOptions(EvaluatorOptions):
    """Of evaluators=dissection."""

    section: ClassVar[str] = "evaluate.dissection"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.dissection.evaluator:EVALUATOR"

    path: Annotated[str | None, Role.FILE] = None
    """Folder of an unpacked Broden (broden1_224); null is a small set that is drawn."""
    images: Annotated[int | None, Ge(1)] = None
    """The first of the set; null takes all of Broden, and draws 400."""
    stage: Annotated[int | None, Ge(1)] = None
    """Whose channels are the units, from 1; null is the deepest."""
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.005
    """Of a unit's activations, over all images and places, the part above its threshold."""
    iou: Annotated[float, Gt(0), Le(1)] = 0.05
    """From which on a unit detects its concept."""
    cat_presence: Literal["mask", "image"] = "mask"
    """Which images count for a concept's category: where pixels at which the unit fires carry it (the published code),
    or where any do (the paper's text)."""
    legacy_norm: bool = False
    """Normalize as the published code does, by one standard deviation for all channels, and not as the network was
    trained."""
    top_units: Annotated[int, Ge(0)] = 8
    """Of the highest IoU: named, and shown with `top_images` images that excite them most."""
    top_images: Annotated[int, Ge(1)] = 4


@dataclass(frozen=True, kw_only=True)
class DiffroarOptions(EvaluatorOptions):
    """Of evaluators=diffroar. It trains len(keep) * (2 len(seeds) + 1) + 1 probes and holds all records in memory, 15 bytes
    a pixel (7 with unit=pixel)."""

    section: ClassVar[str] = "evaluate.diffroar"
    implementation: ClassVar[str] = "pipeline.evaluation.evaluators.diffroar.evaluator:EVALUATOR"

    keep: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Fractions of the coordinates that a probe sees."""
    unit: Literal["coord", "pixel"] = "coord"
    """What is ranked and kept: each channel of a pixel for itself, or the pixel."""
    train_split: str = "train"
    """Of the store: what probes learn from, without the records that are evaluated."""
    train_records: Annotated[int, Ge(2)] = 500
    test_records: Annotated[int, Ge(1)] = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the probes."""
    epochs: Annotated[int, Ge(1)] = 8
    batch_size: Annotated[int, Ge(2)] = 32
    lr: Annotated[float, Gt(0)] = 0.01
    """Of Adam; falls to 0 linearly, from epoch to epoch."""
    width: Annotated[int, Ge(1)] = 16
    """Channels of a probe's first convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.diffroar"
        require(
            len(self.keep) > 0 and all(0 <= fraction <= 1 for fraction in self.keep),
            f"{section}.keep are fractions in [0, 1], at least one, got {list(self.keep)}",
        )
        for name in ("keep", "seeds"):
            values = getattr(self, name)
            require(
                0 < len(values) == len(set(values)),
                f"{section}.{name} needs at least one value, each once, got {list(values)}",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatorSections(Options):
    """The sections of `evaluate` that belong to one evaluator each; its numbers are stored with them."""

    shift: Annotated[ShiftOptions, Role.OUTSIDE_IDENTITY] = field(default_factory=ShiftOptions)
    distance_correlation: Annotated[DistanceCorrelationOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=DistanceCorrelationOptions
    )
    unicam: Annotated[UnicamOptions, Role.OUTSIDE_IDENTITY] = field(default_factory=UnicamOptions)
    gradient_alignment: Annotated[GradientAlignmentOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=GradientAlignmentOptions
    )
    class_similarity: Annotated[ClassSimilarityOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=ClassSimilarityOptions
    )
    dissection: Annotated[DissectionOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=DissectionOptions
    )
    five_band: Annotated[FiveBandOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=FiveBandOptions
    )
    diffroar: Annotated[DiffroarOptions, Role.OUTSIDE_IDENTITY] = field(
        default_factory=DiffroarOptions
    )


EVALUATORS: dict[str, type[EvaluatorOptions]] = {
    "accuracy": AccuracyOptions,
    "localization": LocalizationOptions,
    "shift": ShiftOptions,
    "distance_correlation": DistanceCorrelationOptions,
    "unicam": UnicamOptions,
    "gradient_alignment": GradientAlignmentOptions,
    "class_similarity": ClassSimilarityOptions,
    "dissection": DissectionOptions,
    "five_band": FiveBandOptions,
    "diffroar": DiffroarOptions,
    "superfeatures": SuperfeaturesOptions,
}
"""In the order in which the report shows them."""
