"""Evaluators and their options; an evaluator with options has a section of `evaluate` named after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from permafrost.config.options import Options, Role
from permafrost.core.errors import require

Compared = Literal["teacher", "student", "baseline"]
"""Networks whose features are compared: the evaluated student, its teacher, or another run's student
(baseline)."""


def check_pairs(option: str, pairs: tuple[tuple[str, str], ...], baseline: str | None) -> None:
    """Raise ConfigError unless each pair [x, given] names two networks and a baseline is set if one is named."""
    for one, given in pairs:
        require(
            one != given,
            f"{option} compares {one} with itself; name two different networks, [x, given]",
        )
    require(
        baseline is not None or all("baseline" not in pair for pair in pairs),
        f"{option} names baseline, which is another run's student; also set that run, as in "
        f"{option.rpartition('.')[0]}.baseline=kd-student",
    )


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
class EvaluatorOptions(Options):
    """Base class of the options of an evaluator, also used for evaluators without options."""

    is_flat: ClassVar[bool] = False
    """True if its metrics are stored next to `records` in metrics.json rather than below its name."""
    uses_teacher: ClassVar[bool] = False
    """True if it may run the teacher network itself; all other evaluators do not read `teacher`."""
    compares: ClassVar[bool] = False
    """True if it compares with another run, named by its option `baseline`."""
    reads_outputs: ClassVar[bool] = True
    """False if it reads features only, so that the network's classes may be others than those of the data."""


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(EvaluatorOptions):
    """Accuracy, overall and by group, and agreement with the teacher."""

    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.accuracy:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LocalizationOptions(EvaluatorOptions):
    """EPG and IoU of explanations, and their cosine with the teacher's stored maps."""

    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.localization:EVALUATOR"
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ShiftOptions(EvaluatorOptions):
    """Shift-equivariance curve of the student's explanation (e2KD, Figure 5)."""

    section: ClassVar[str] = "evaluate.shift"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.shift:EVALUATOR"

    pixels: Annotated[int | None, Ge(1)] = None
    """Largest shift of the input in pixels (32 in the paper); null disables the curve. The frames must be
    larger than the student's input by that many pixels."""
    records: Annotated[int, Ge(1)] = 256
    """Records per split; every shift is one forward pass of each of them."""


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesOptions(EvaluatorOptions):
    """Agreement with the teacher, superfeature by superfeature (KED)."""

    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.superfeatures:EVALUATOR"


@dataclass(frozen=True, kw_only=True)
class DistanceCorrelationOptions(EvaluatorOptions):
    """Distilled and residual features (UniCAM): FSS and RS by layer, on a fixed set of records."""

    section: ClassVar[str] = "evaluate.distance_correlation"
    implementation: ClassVar[str] = (
        "permafrost.evaluation.evaluators.distance_correlation.evaluator:EVALUATOR"
    )
    uses_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False

    probe_records: Annotated[int, Ge(4)] = 512
    """Records per split, balanced over classes; fewer if a split has fewer. A block too small for 4 records of
    every class contains 4 records each of some randomly drawn classes. With 1,000 classes, one block of 4,000
    records covers all. All features of one layer in a block are held in memory: 1.6 GB for the largest layer of
    a ResNet-50 at 224 pixels and 512 records."""
    seed: int = 0
    """Seed of the choice of records, independent of the run's seed."""
    block_records: Annotated[int, Ge(64)] = 512
    """Records per block. A larger set is compared in blocks of about this size, whose inner products are
    summed."""
    layers: dict[str, str] = field(default_factory=dict)
    """Mapping from the student's layers to the teacher's; empty pairs them from the deepest. Names: layer1,
    layer2, ... (the stages) and pooled (the average of the last stage), or features and pooled, or logits,
    depending on the network."""
    pairs: tuple[tuple[Compared, Compared], ...] = ()
    """Pairs [x, given] of RS, out of teacher, student and baseline: what x has beyond given. Empty: [teacher,
    student] and [student, teacher], and with a baseline also [student, baseline] and [baseline, student]."""
    baseline: str | None = None
    """Run of another student, such as one trained on labels only; what the student has beyond it was distilled.
    In a sweep it may name an arm, whose student with the same seed is used."""
    permutations: Annotated[int, Ge(19)] = 999
    """Permutations of the labels for the p-values of relevance and RS; the smallest p-value is 1 /
    (permutations + 1)."""
    embeddings: Annotated[str | None, Role.FILE] = None
    """File of class embeddings (.npy, [K, e]), for example of the class names; null: one-hot. For two classes
    the choice makes no difference."""
    l2norm: bool = False
    """Divide each record's features by their L2 norm, as the released code does for FSS."""
    biased: bool = False
    """Also compute fss_biased, the V-statistic of the released code on such features, for parity. It approaches
    1 for any two networks if there are many features and few records."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.distance_correlation"
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)


@dataclass(frozen=True, kw_only=True)
class UnicamOptions(EvaluatorOptions):
    """Maps of distilled and residual features (UniCAM), of each record against fixed banks of others."""

    section: ClassVar[str] = "evaluate.unicam"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.unicam.evaluator:EVALUATOR"
    uses_teacher: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False

    records: Annotated[int, Ge(1)] = 8
    """Explained records per split, balanced over classes."""
    bank_records: Annotated[int, Ge(4)] = 255
    """Records per bank, balanced over classes; fewer if a split has too few for all banks. A bank too small for
    4 records of every class contains 4 records each of some randomly drawn classes, and records of these
    classes are explained."""
    banks: Annotated[int, Ge(1)] = 2
    """Number of banks R; a map is the mean over them, and its reliability is how well they agree."""
    seed: int = 0
    """Seed of the choice of records and banks, independent of the run's seed."""
    depths: tuple[int, ...] = (1,)
    """Depths to compare: 1 the pooled features, 2 the last stage at all positions, 3 the stage before it, and
    so on. With several depths there is also a map of their mean. The features of a bank at all depths are held
    in memory together."""
    reductions: tuple[Literal["cam", "hirescam"], ...] = ("cam", "hirescam")
    """Reductions of the gradient to a map; at depth 1 they are equal up to rounding."""
    embeddings: Annotated[str | None, Role.FILE] = None
    """File of class embeddings, as evaluate.distance_correlation.embeddings; null: one-hot."""
    pairs: tuple[tuple[Compared, Compared], ...] = ()
    """Pairs [x, given]: the part of x's relevance to the labels beyond given, on x's grid. Empty: [teacher,
    student] (residual) and [student, teacher], and with a baseline also [student, baseline] (distilled) and
    [baseline, student]."""
    baseline: str | None = None
    """Run of another student, such as one trained on labels only; in a sweep it may name an arm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.unicam"
        for name in ("depths", "reductions"):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values),
                f"{section}.{name} must list at least one value, each once, got {list(values)}",
            )
        require(min(self.depths) >= 1, f"{section}.depths must be >= 1, got {list(self.depths)}")
        check_pairs(f"{section}.pairs", self.pairs, self.baseline)


@dataclass(frozen=True, kw_only=True)
class GradientAlignmentOptions(EvaluatorOptions):
    """Options of evaluators=gradient_alignment."""

    section: ClassVar[str] = "evaluate.gradient_alignment"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.gradient_alignment:EVALUATOR"

    records: Annotated[int, Ge(1)] = 2048
    """Records per split, balanced over classes; each takes two backward passes."""
    pictures: Annotated[int, Ge(0)] = 6
    """Records per split whose loss gradient is shown in the report, the same for all networks; 0 shows none."""


@dataclass(frozen=True, kw_only=True)
class ClassSimilarityOptions(EvaluatorOptions):
    """Options of evaluators=class_similarity."""

    section: ClassVar[str] = "evaluate.class_similarity"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.class_similarity:EVALUATOR"

    tau: Annotated[float, Gt(0)] = 1.0
    """Temperature of the class probabilities."""
    similarity: Annotated[str | None, Role.FILE] = None
    """File of a class similarity to compare with, in addition to the teacher's class means. Either a matrix [K,
    K] (.npy), or a text file with the superclass of one class per line, in label order."""
    reference: Literal["cifar100_coarse"] | None = None
    """Known class similarity to compare with, instead of a file. cifar100_coarse: the 20 coarse classes of
    CIFAR-100, found by the names of the classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.class_similarity"
        require(
            self.similarity is None or self.reference is None,
            f"{section}.reference={self.reference} and {section}.similarity={self.similarity} each give a class "
            "similarity; set one of them to null",
        )


@dataclass(frozen=True, kw_only=True)
class FiveBandOptions(EvaluatorOptions):
    """Options of evaluators=five_band."""

    section: ClassVar[str] = "evaluate.five_band"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.five_band:EVALUATOR"

    thresholds: Literal["legacy", "v2"] = "legacy"
    """Schedule that moves the thresholds toward 0 for the soft score. legacy: 11 steps of 0.02, from (0.3, 0.7)
    to (0.1, 0.5). v2: 56 steps of 0.005, to (0.025, 0.425)."""


@dataclass(frozen=True, kw_only=True)
class DissectionOptions(EvaluatorOptions):
    """Options of evaluators=dissection."""

    section: ClassVar[str] = "evaluate.dissection"
    implementation: ClassVar[str] = (
        "permafrost.evaluation.evaluators.dissection.evaluator:EVALUATOR"
    )

    path: Annotated[str | None, Role.FILE] = None
    """Folder of an unpacked Broden (broden1_224); null generates a small synthetic set."""
    images: Annotated[int | None, Ge(1)] = None
    """Number of images, the first of the set; null takes all of Broden, or generates 400."""
    stage: Annotated[int | None, Ge(1)] = None
    """Stage whose channels are the units, counted from 1; null takes the deepest."""
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.005
    """Fraction of a unit's activations, over all images and positions, that exceeds its threshold."""
    iou: Annotated[float, Gt(0), Le(1)] = 0.05
    """Smallest IoU at which a unit detects its concept."""
    cat_presence: Literal["mask", "image"] = "mask"
    """Images that count for a concept's category. mask: those in which a pixel where the unit fires carries a
    label of the category (published code). image: those in which any pixel does (text of the paper)."""
    legacy_norm: bool = False
    """Normalize as the published code does, with one standard deviation for all channels, and not as in
    training."""
    top_units: Annotated[int, Ge(0)] = 8
    """Number of units with the highest IoU that are named and shown, each with the `top_images` images that
    excite it most."""
    top_images: Annotated[int, Ge(1)] = 4
    """Number of images shown per unit."""


@dataclass(frozen=True, kw_only=True)
class DiffroarOptions(EvaluatorOptions):
    """Options of evaluators=diffroar.

    It trains len(keep) * (2 len(seeds) + 1) + 1 probes and holds all records in memory, 6 bytes per pixel (4 with
    unit=pixel), which is 0.3 MB per record of 224 pixels.
    """

    section: ClassVar[str] = "evaluate.diffroar"
    implementation: ClassVar[str] = "permafrost.evaluation.evaluators.diffroar.evaluator:EVALUATOR"

    keep: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    """Fractions of the coordinates that a probe is given, rounded to multiples of 1 / 256."""
    unit: Literal["coord", "pixel"] = "coord"
    """Unit that is ranked and kept: each channel of a pixel separately, or the whole pixel."""
    train_split: str = "train"
    """Split of the store that probes are trained on, excluding the evaluated records."""
    train_records: Annotated[int, Ge(2)] = 500
    """Records that probes are trained on, balanced over classes."""
    records_per_class: Annotated[int, Ge(1)] = 20
    """Smallest number of training records for each class, on average. Fewer are an error, because a probe then
    learns nothing with any mask."""
    test_records: Annotated[int, Ge(1)] = 500
    """Records that probes are evaluated on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the probes."""
    epochs: Annotated[int, Ge(1)] = 8
    """Epochs of training a probe."""
    batch_size: Annotated[int, Ge(2)] = 32
    """Batch size of training a probe."""
    lr: Annotated[float, Gt(0)] = 0.01
    """Learning rate of Adam, which decreases linearly to 0, epoch by epoch."""
    width: Annotated[int, Ge(1)] = 16
    """Channels of a probe's first convolution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        section = "evaluate.diffroar"
        require(
            len(self.keep) > 0 and all(0 <= fraction <= 1 for fraction in self.keep),
            f"{section}.keep must list at least one fraction in [0, 1], got {list(self.keep)}",
        )
        for name in ("keep", "seeds"):
            values = getattr(self, name)
            require(
                0 < len(values) == len(set(values)),
                f"{section}.{name} must list at least one value, each once, got {list(values)}",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluatorSections(Options):
    """Sections of `evaluate` that belong to one evaluator each and are stored with its results."""

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
"""Evaluators in the order in which the report shows them."""
