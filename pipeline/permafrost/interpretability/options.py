"""Options of the evaluators of the interpretability study (Han et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from permafrost.config.evaluators import EVALUATORS, EvaluatorOptions
from permafrost.config.options import Role
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class GradientAlignmentOptions(EvaluatorOptions):
    """Options of evaluators=gradient_alignment."""

    section: ClassVar[str] = "evaluate.gradient_alignment"
    implementation: ClassVar[str] = "permafrost.interpretability.gradient_alignment:EVALUATOR"

    records: Annotated[int, Ge(1)] = 2048
    """Records per split, balanced over classes; each takes two backward passes."""
    pictures: Annotated[int, Ge(0)] = 6
    """Records per split whose loss gradient is shown in the report, the same for all networks; 0 shows none."""


@dataclass(frozen=True, kw_only=True)
class ClassSimilarityOptions(EvaluatorOptions):
    """Options of evaluators=class_similarity."""

    section: ClassVar[str] = "evaluate.class_similarity"
    implementation: ClassVar[str] = "permafrost.interpretability.class_similarity:EVALUATOR"

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
    implementation: ClassVar[str] = "permafrost.interpretability.five_band:EVALUATOR"

    thresholds: Literal["legacy", "v2"] = "legacy"
    """Schedule that moves the thresholds toward 0 for the soft score. legacy: 11 steps of 0.02, from (0.3, 0.7)
    to (0.1, 0.5). v2: 56 steps of 0.005, to (0.025, 0.425)."""


@dataclass(frozen=True, kw_only=True)
class DissectionOptions(EvaluatorOptions):
    """Options of evaluators=dissection."""

    section: ClassVar[str] = "evaluate.dissection"
    implementation: ClassVar[str] = "permafrost.interpretability.dissection:EVALUATOR"

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
    implementation: ClassVar[str] = "permafrost.interpretability.diffroar:EVALUATOR"

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


def register() -> None:
    """Add the evaluators of the study."""
    EVALUATORS["gradient_alignment"] = GradientAlignmentOptions
    EVALUATORS["class_similarity"] = ClassSimilarityOptions
    EVALUATORS["dissection"] = DissectionOptions
    EVALUATORS["five_band"] = FiveBandOptions
    EVALUATORS["diffroar"] = DiffroarOptions
