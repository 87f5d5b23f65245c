"""Options of the interpretability study (Han et al. 2023): its variants, its drawn set and its evaluators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from permafrost.config.augment import VIEWS, PolicyConfig, ViewsConfig
from permafrost.config.data import SOURCES, DataConfig
from permafrost.config.evaluation import EVALUATORS, EvaluatorOptions
from permafrost.config.methods import METHODS, FeatureKDConfig, MethodSetting
from permafrost.config.options import Role
from permafrost.core.errors import require

# ---- variants ------------------------------------------------------------------------------------


NUM_ROTATIONS = 4


@dataclass(frozen=True, kw_only=True)
class RotationsViewsConfig(ViewsConfig):
    """Frame rotated by 0, 90, 180 and 270 degrees."""

    implementation: ClassVar[str] = "permafrost_papers.interpretability.rotations:draw_rotations"
    expansion: ClassVar[str] = "permafrost_papers.interpretability.rotations:turn_views"

    kind: Literal["rotations"] = "rotations"
    count: int = NUM_ROTATIONS

    def _check_together(self) -> None:
        require(
            self.count == NUM_ROTATIONS,
            f"views.count={self.count}: views=rotations has exactly {NUM_ROTATIONS}",
        )


@dataclass(frozen=True, kw_only=True)
class FTConfig(FeatureKDConfig):
    """Factor transfer (Kim et al. 2018): the teacher's features paraphrased, the student's translated.

    The features are those of the deepest stage of a pass with the output features, or of a live teacher's last stage.
    """

    implementation: ClassVar[str] = "permafrost_papers.interpretability.ft:FTLoss"
    kind: Literal["ft"] = "ft"
    lambda_ft: Annotated[float, Ge(0)] = 1000.0
    """Weight of the factor term, large because the term is a mean over elements; 0 disables it."""
    paraphrase_rate: Annotated[float, Gt(0), Le(1)] = 0.5
    """Channels of the factors as a fraction of the teacher's."""
    paraphraser_epochs: Annotated[int, Ge(0)] = 1
    """Epochs of training the paraphraser on the teacher's features, before the student's first step; 0 leaves
    it random."""
    paraphraser_lr: Annotated[float, Gt(0)] = 0.01
    """Learning rate of that training."""


@dataclass(frozen=True, kw_only=True)
class SSKDConfig(FeatureKDConfig):
    """SSKD (Xu et al. 2020): distillation of a task on pooled features, to identify the record of a rotated image.

    mode=live rotates each view of the student, as the public code does. Stored rotations of the whole image need
    mode=replay views=rotations views.per_step=4. Both count rotations in trainer.batch_size. total = lambda_ce * ce
    + lambda_kd * kd on upright images + lambda_ss * ss (similarities) + lambda_tf * tf (logits) on rotated ones. The
    defaults are those of the public code.
    """

    implementation: ClassVar[str] = "permafrost_papers.interpretability.sskd:SSKDLoss"
    minimal: ClassVar[tuple[str, ...]] = ("mode=replay", "views=rotations", "views.per_step=4")
    live_views: ClassVar[str] = "rotations"

    kind: Literal["sskd"] = "sskd"
    tau: float = 4.0
    """Temperature of the logits, for upright and rotated images."""
    lambda_kd: float = 0.9
    """Weight of the logit term on upright images; 0 in the feature-only variant of Han et al. 2023."""
    lambda_ss: Annotated[float, Ge(0)] = 10.0
    """Weight of the similarities; 0 disables them, and no feature is read."""
    lambda_tf: Annotated[float, Ge(0)] = 2.7
    """Weight of the logit term on rotated images."""
    tau_ss: Annotated[float, Gt(0)] = 0.5
    """Temperature of the similarities."""
    keep_wrong_ss: Annotated[float, Ge(0), Le(1)] = 0.75
    """Fraction kept of the rotated images that the teacher assigns to the wrong record, best-ranked first."""
    keep_wrong_tf: Annotated[float, Ge(0), Le(1)] = 1.0
    """Fraction kept of the rotated images that the teacher assigns to the wrong class, best-ranked first."""
    head_epochs: Annotated[int, Ge(0)] = 30
    """Epochs of training the teacher's head on its features, before the student's first step; 0 leaves it
    random."""
    head_lr: Annotated[float, Gt(0)] = 0.1
    """Learning rate of that training, divided by 10 after each third of head_epochs."""

    def check(self, setting: MethodSetting) -> None:
        views, trainer = setting.views, setting.trainer
        require(
            setting.mode != "frozen"
            and isinstance(views, RotationsViewsConfig)
            and views.per_step == NUM_ROTATIONS,
            "method=sskd compares an image with its three rotations in one step; set mode=live with the teacher "
            f"network, or mode=replay views=rotations views.per_step={NUM_ROTATIONS} instead of mode={setting.mode}, "
            f"views={views.kind}, views.per_step={views.per_step}",
        )
        setting.augment.refuse_mix(
            "method=sskd compares four rotations of one image, which would be different images; set method=kd"
        )
        policies = [
            operation.kind
            for operation in setting.augment.operations
            if isinstance(operation, PolicyConfig)
        ]
        require(
            not policies,
            f"augment.operations has {' and '.join(policies)}: method=sskd compares four rotations of one image, which "
            "would be different images; set method=kd, or leave it out",
        )
        require(
            trainer.batch_size > NUM_ROTATIONS * trainer.ranks,
            f"trainer.batch_size={trainer.batch_size} leaves each of {trainer.ranks} ranks one record, and "
            "method=sskd needs several to distinguish; raise it",
        )


@dataclass(frozen=True, kw_only=True)
class CRDConfig(FeatureKDConfig):
    """CRD (Tian et al. 2020): contrastive loss on a record's embedding against those of records of other classes.

    The defaults are those of its public code. With lambda_ce and lambda_kd 0 the classifier is not trained, and only
    the features are worth evaluating: the feature-only variant of Han et al. 2023.
    """

    implementation: ClassVar[str] = "permafrost_papers.interpretability.crd:CRDLoss"
    trained_by: ClassVar[tuple[str, ...]] = ("lambda_ce", "lambda_kd", "lambda_crd")

    kind: Literal["crd"] = "crd"
    lambda_crd: Annotated[float, Ge(0)] = 0.8
    """Weight of the contrastive term; 0 disables it, and no embedding is kept."""
    embedding_size: Annotated[int, Ge(1)] = 128
    """Size of the embeddings, linear maps of each network's pooled features."""
    tau_crd: Annotated[float, Gt(0)] = 0.07
    """Temperature of the embeddings' inner products; tau is that of the logits."""
    negatives: Annotated[int, Ge(1)] = 16384
    """Negatives per record and step: records of other classes, redrawn in every step with replacement. It is
    limited to the smallest number of records of other classes that any class has."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Momentum of each record's stored embedding: the weight of the old value when the record is visited again."""

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_crd > 0:
            require(
                setting.views.per_step == 1,
                f"method=crd keeps one embedding per record, and views.per_step={setting.views.per_step} puts each "
                "record several times into a batch; set views.per_step=1",
            )
            setting.augment.refuse_mix(
                "method=crd keeps one embedding per record, and a mixed image has two: set method=kd"
            )


# ---- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CellsDataConfig(DataConfig):
    """Drawn cells of ten classes, with masks that mark the class-defining part (cells.py)."""

    implementation: ClassVar[str] = "permafrost_papers.interpretability.cells:CellsSource"

    kind: Literal["cells"] = "cells"
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the drawn images."""
    image_size: Annotated[int, Ge(24), Le(512)] = 64
    """Side of an image in pixels."""
    train_records: Annotated[int, Ge(1)] = 2000
    """Records in split train, with the classes taking turns."""
    test_records: Annotated[int, Ge(1)] = 500
    """Records in split test, with the classes taking turns."""


# ---- evaluators ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GradientAlignmentOptions(EvaluatorOptions):
    """Options of evaluators=gradient_alignment."""

    section: ClassVar[str] = "evaluate.gradient_alignment"
    implementation: ClassVar[str] = (
        "permafrost_papers.interpretability.gradient_alignment:EVALUATOR"
    )

    records: Annotated[int, Ge(1)] = 2048
    """Records per split, balanced over classes; each takes two backward passes."""
    pictures: Annotated[int, Ge(0)] = 6
    """Records per split whose loss gradient is shown in the report, the same for all networks; 0 shows none."""


@dataclass(frozen=True, kw_only=True)
class ClassSimilarityOptions(EvaluatorOptions):
    """Options of evaluators=class_similarity."""

    section: ClassVar[str] = "evaluate.class_similarity"
    implementation: ClassVar[str] = "permafrost_papers.interpretability.class_similarity:EVALUATOR"

    tau: Annotated[float, Gt(0)] = 1.0
    """Temperature of the class probabilities."""
    similarity: Annotated[str | None, Role.FILE] = None
    """File of a class similarity to compare with, in addition to the teacher's class means. Either a matrix [K,
    K] (.npy), or a text file with the superclass of one class per line, in label order."""
    reference: Literal["cifar100_coarse"] | None = None
    """Known class similarity to compare with, instead of a file. cifar100_coarse: the 20 coarse classes of
    CIFAR-100, found by the names of the classes."""

    def _check_together(self) -> None:
        require(
            self.similarity is None or self.reference is None,
            f"{self.section}.reference={self.reference} and {self.section}.similarity={self.similarity} each give a "
            "class similarity; set one of them to null",
        )


@dataclass(frozen=True, kw_only=True)
class FiveBandOptions(EvaluatorOptions):
    """Options of evaluators=five_band."""

    section: ClassVar[str] = "evaluate.five_band"
    implementation: ClassVar[str] = "permafrost_papers.interpretability.five_band:EVALUATOR"

    thresholds: Literal["legacy", "v2"] = "legacy"
    """Schedule that moves the thresholds toward 0 for the soft score. legacy: 11 steps of 0.02, from (0.3, 0.7)
    to (0.1, 0.5). v2: 56 steps of 0.005, to (0.025, 0.425)."""


@dataclass(frozen=True, kw_only=True)
class DissectionOptions(EvaluatorOptions):
    """Options of evaluators=dissection."""

    section: ClassVar[str] = "evaluate.dissection"
    implementation: ClassVar[str] = "permafrost_papers.interpretability.dissection:EVALUATOR"

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
    implementation: ClassVar[str] = "permafrost_papers.interpretability.diffroar:EVALUATOR"

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

    def _check_together(self) -> None:
        require(
            len(self.keep) > 0 and all(0 <= fraction <= 1 for fraction in self.keep),
            f"{self.section}.keep must list at least one fraction in [0, 1], got {list(self.keep)}",
        )
        for name in ("keep", "seeds"):
            values = getattr(self, name)
            require(
                0 < len(values) == len(set(values)),
                f"{self.section}.{name} must list at least one value, each once, got {list(values)}",
            )


METHODS.update({"ft": FTConfig, "crd": CRDConfig, "sskd": SSKDConfig})
SOURCES["cells"] = CellsDataConfig
VIEWS["rotations"] = RotationsViewsConfig
EVALUATORS.update(
    {
        "gradient_alignment": GradientAlignmentOptions,
        "class_similarity": ClassSimilarityOptions,
        "dissection": DissectionOptions,
        "five_band": FiveBandOptions,
        "diffroar": DiffroarOptions,
    }
)
