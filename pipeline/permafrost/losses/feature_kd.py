"""Distillation of features, baselines of e2KD: attention (AT) and class maps (CAT-KD), and what such losses share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import ATConfig, CatKDConfig, FeatureKDConfig, Standardization
from permafrost.core.batches import AnyLabels, AnyLogits, Targets, require_logits
from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.losses.base import (
    DistillationLoss,
    Needs,
    StoredTeacher,
    StudentOutput,
    Term,
    TrainingRecords,
)
from permafrost.losses.labels import label_term, off_label_bce_loss
from permafrost.losses.logit_distances import kd_loss
from permafrost.losses.map_distances import unit_scale
from permafrost.losses.restored_features import RestoredFeatures
from permafrost.losses.shapes import require_same_shape
from permafrost.losses.standardized_features import standardization_of
from permafrost.models.classifier import (
    POOLED_STAGE,
    Intermediates,
    attention_map,
    stage_index,
    stage_number,
    to_float32,
)


class FeatureKDLoss(DistillationLoss):
    """Loss lambda_ce * labels + lambda_kd * kd + weight * specific term.

    A term with weight 0 is not computed, and its inputs are not requested from the networks. With labels only, this is
    the supervised loss.
    """

    term: ClassVar[str]
    """Name of the specific term, whose weight is the option lambda_<term>."""
    term_needs: ClassVar[Needs]
    """Needs of the specific term."""
    restores_features: ClassVar[bool] = False
    """True if features of a pass with annotate.features_channels get the teacher's channels back."""

    config: FeatureKDConfig

    def __init__(self, config: FeatureKDConfig) -> None:
        super().__init__(config)
        self.restored: RestoredFeatures | None = None
        self.standardization: Standardization = getattr(config, "standardize", "none")
        self.standards: dict[str, tuple[Tensor, Tensor]] = {}
        """Mean and matrix of each field, computed at first use."""

    def plan(
        self, config: DistillConfig, passes: Sequence[StoredTeacher], num_classes: int
    ) -> None:
        self.passes, self.split = passes, config.split
        require(
            self.standardization == "none" or len(passes) > 0,
            f"method.standardize={self.standardization} is computed from the stored values of a pass, and mode=live "
            "has none; set mode=frozen, or method.standardize=none",
        )
        if self.weight > 0 and (self.restores_features or self.standardization != "none"):
            self.restored = RestoredFeatures(passes)

    def convert_targets(self, targets: tuple[Targets, ...]) -> tuple[Targets, ...]:
        return targets if self.restored is None else tuple(map(self.restored, targets))

    def standardized(self, targets: Targets, field: str, values: Tensor) -> Tensor:
        """Return values [B, C, ...] of a teacher's field as method.standardize has them."""
        if self.standardization == "none":
            return values
        if field not in self.standards:
            (teacher,) = (each for each in self.passes if each.name == targets.teacher)
            self.standards[field] = standardization_of(
                teacher, field, self.split, self.standardization
            )
        mean, matrix = (each.to(values) for each in self.standards[field])
        return ((values.movedim(1, -1) - mean) @ matrix.T).movedim(-1, 1)

    @property
    def weight(self) -> float:
        """Weight of the specific term."""
        weight: float = getattr(self.config, f"lambda_{self.term}")
        return weight

    @abstractmethod
    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        """Compute the specific term, a scalar.

        Args:
            student: Outputs of the student, through which gradients flow.
            targets: Targets of the teacher, with what `term_needs` requests.
        """

    def require_one_teacher(self, records: TrainingRecords) -> None:
        """Raise ConfigError if the student has several teachers, whose features have nothing in common."""
        require(
            len(records.passes) <= 1,
            f"method={self.config.kind} supports one teacher, but store.teacher names {len(records.passes)}; name one",
        )

    @property
    def needs(self) -> Needs:
        return replace(
            self.term_needs if self.weight > 0 else Needs(),
            labels=self.reads_labels,
            logits=self.config.lambda_kd > 0,
            map_control=getattr(self.config, "map_control", "none"),
        )

    @property
    def reads_labels(self) -> bool:
        """True if the loss reads the labels of the data."""
        return self.config.lambda_ce > 0

    def check_labels(self, *, many: bool) -> None:
        require(
            not many or self.config.lambda_kd == 0,
            f"method.lambda_kd={self.config.lambda_kd} compares one distribution over all classes, but records of "
            "this store have many labels; set it to 0, or set method=kd method.logits=mld",
        )

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield from self.logit_terms(student.logits, targets.logits, labels)
        yield Term(self.term, self.weight, lambda: self.compare(student, targets))

    def logit_terms(
        self, logits: Tensor, teacher_logits: AnyLogits | None, labels: AnyLabels
    ) -> Iterable[Term]:
        """Return the terms on labels and logits.

        Args:
            logits: Logits of the student, [B, K].
            teacher_logits: Logits of the teacher, None if they are not stored and lambda_kd is 0.
            labels: Labels in the form of Batch.
        """
        config = self.config
        if config.label_loss == "bce_offlabel":
            yield Term("bce", config.lambda_ce, lambda: off_label_bce_loss(logits, labels))
        else:
            yield label_term(logits, labels, config.lambda_ce)
        yield Term(
            "kd",
            config.lambda_kd,
            lambda: kd_loss(logits, require_logits(teacher_logits), config.tau),
        )


# ---- at --------------------------------------------------------------------------------------------


def attention_loss(
    student_attention: Tensor, teacher_attention: Tensor, norm: Literal["mse", "l2"] = "mse"
) -> Tensor:
    """Compute the mean of (Q_s / ||Q_s|| - Q_t / ||Q_t||)^2 over records and positions.

    Norms are over a record's positions.
    If the grids differ, the finer map is first averaged over the cells of the coarser one. A map that is zero
    everywhere has no gradient.

    Args:
        student_attention: [B, h, w]. Gradients flow here.
        teacher_attention: [B, h, w], constant, of any positive scale.
        norm: "mse" as in public code, or "l2" as printed in the paper: the mean over records of the norm of the
            difference, not squared.
    """
    require_same_shape("attention_loss", student_attention, teacher_attention, 3, equal=1)
    h, w = map(min, student_attention.shape[1:], teacher_attention.shape[1:])
    student, teacher = (
        F.normalize(pool_cells(unit_scale(attention, (1, 2)), (h, w)).flatten(1), dim=1)
        for attention in (student_attention, teacher_attention.detach())
    )
    if norm == "l2":
        norms: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
        return norms.mean()
    return F.mse_loss(student, teacher)


class ATLoss(FeatureKDLoss):
    """Sum over stages of `attention_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "at"
    term_needs = Needs(intermediates=Intermediates(stages=True), outputs=("attention",))
    config: ATConfig

    def build(self, student: StudentOutput, targets: Targets) -> None:
        student_count, teacher_count = len(student.output.stages), len(targets.intermediates)
        have = f"the student has {student_count} stages, the teacher {teacher_count}"
        if not self.config.stages:
            both = list(range(-min(student_count, teacher_count), 0))
            require(
                student_count == teacher_count,
                f"method=at: {have}; name the stages to compare, as in method.stages={both} (-1 is the deepest, 1 the "
                "finest)",
            )
        require(
            max(map(abs, self.config.stages), default=1) <= min(student_count, teacher_count),
            f"method.stages={list(self.config.stages)}: {have}; name stages that both have",
        )

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        student_count, teacher_count = len(student.output.stages), len(targets.intermediates)
        losses = [
            attention_loss(
                attention_map(student.output.stages[stage_index(number, student_count)].output),
                targets.intermediates[f"attention_{stage_index(number, teacher_count) + 1}"],
                self.config.norm,
            )
            for number in self.config.stages or range(1, student_count + 1)
        ]
        return torch.stack(losses).sum()


# ---- cat kd ----------------------------------------------------------------------------------------


def class_map_loss(
    student_maps: Tensor, teacher_maps: Tensor, resolution: int, *, normalize: bool = False
) -> Tensor:
    """Compute the mean squared difference of pooled class maps, over records, classes and resolution^2 cells.

    Args:
        student_maps: [B, K, h, w]. Gradients flow here.
        teacher_maps: [B, K, h, w], constant, in the logits' units, on any grid.
        resolution: Number of cells per side to which both are pooled.
        normalize: Divide each pooled map by its L2 norm first.
    """
    require_same_shape("class_map_loss", student_maps, teacher_maps, 4, equal=2)
    student, teacher = (
        pool_cells(to_float32(maps), resolution).flatten(2)
        for maps in (student_maps, teacher_maps.detach())
    )
    if normalize:
        student, teacher = (
            F.normalize(unit_scale(maps, (2,)), dim=2) for maps in (student, teacher)
        )
    return F.mse_loss(student, teacher)


CLASS_MAP_NEEDS = Needs(
    intermediates=Intermediates(class_maps=True),
    outputs=("class_maps",),
)
"""Needs of `class_map_loss`."""


def check_resolution(resolution: int, targets: Targets) -> None:
    """Raise ConfigError if the teacher's class maps have fewer cells per side than `resolution`."""
    h, w = targets.intermediates["class_maps"].shape[-2:]
    require(
        resolution <= min(h, w),
        f"method.resolution={resolution} is finer than the teacher's class maps of {h}x{w} cells; lower it, or store "
        "finer maps with annotate.class_map_size",
    )


class CatKDLoss(FeatureKDLoss):
    """Loss `class_map_loss`, in addition to labels and logits (e2KD, section 5)."""

    term = "cat"
    term_needs = CLASS_MAP_NEEDS
    config: CatKDConfig

    def build(self, student: StudentOutput, targets: Targets) -> None:
        check_resolution(self.config.resolution, targets)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        return class_map_loss(
            student.output.require("class_maps"),
            targets.intermediates["class_maps"],
            self.config.resolution,
            normalize=self.config.normalize,
        )


# ---- features of a pass ----------------------------------------------------------------------------


def covered_mse(student: Tensor, teacher: Tensor, coverage: Tensor | None) -> Tensor:
    """Compute the mean squared difference of features over records, channels and cells, weighted by the coverage.

    Args:
        student: [B, C, h, w].
        teacher: [B, C, h, w].
        coverage: [B, 1, h, w] in [0, 1], or None to weight all cells alike.
    """
    require_same_shape("covered_mse", student, teacher, 4)
    student, teacher = to_float32(student), to_float32(teacher)
    if coverage is None:
        return F.mse_loss(student, teacher)
    return weighted_mean((student - teacher).square(), coverage)


def weighted_mean(values: Tensor, coverage: Tensor) -> Tensor:
    """Compute the mean of values over records, channels and cells, weighted by the coverage; 0 without any coverage.

    Args:
        values: [B, C, h, w].
        coverage: [B, 1, h, w] in [0, 1].
    """
    total = coverage.sum() * values.shape[1]
    return (values * coverage).sum() / total.clamp(min=_LEAST_COVERAGE)


def pool_cells(values: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Average values over the cells of another grid, as torch's adaptive_avg_pool2d does.

    Its gradient on a GPU is a sum without a fixed order, and that of averages over whole cells or of products is not.

    Args:
        values: [B, C, h, w] or [B, h, w].
        size: Height and width of the grid, or its side.
    """
    height, width = (size, size) if isinstance(size, int) else size
    h, w = values.shape[-2:]
    if height == width == 1:
        return values.mean(dim=(-2, -1), keepdim=True)
    if h % height == 0 and w % width == 0:
        return F.avg_pool2d(values, (h // height, w // width))
    rows, columns = (
        _shares_of_cells(length, cells, values) for length, cells in ((h, height), (w, width))
    )
    return rows @ values @ columns.T


def _shares_of_cells(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the share of each of `length` places in each cell, [cells, length]: those that a cell touches, alike."""
    places = torch.arange(length, device=like.device)
    numbers = torch.arange(cells, device=like.device)[:, None]
    touched = (places >= numbers * length // cells) & (places * cells < (numbers + 1) * length)
    return touched / touched.sum(dim=1, keepdim=True, dtype=like.dtype)


def covered_pool(features: Tensor, coverage: Tensor | None, size: int | tuple[int, int]) -> Tensor:
    """Average features over the covered parts of each cell of a grid of `size`, 0 where nothing is covered.

    Args:
        features: [B, C, h, w].
        coverage: [B, 1, h, w] in [0, 1], or None if everything is covered.
        size: Height and width of the grid, or its side.
    """
    if coverage is None:
        return pool_cells(features, size)
    share = pool_cells(coverage, size).clamp(min=_LEAST_COVERAGE)
    return pool_cells(features * coverage, size) / share


_LEAST_COVERAGE = 1e-6
"""Divisor where nothing is covered."""


def stored_stages(targets: Targets) -> list[int]:
    """Return the numbers of the teacher's stages that the targets have, ascending from 1 at the finest."""
    return sorted(stage_number(name) for name in targets.intermediates if name != POOLED_STAGE)


def field_of_stage(stage: int) -> str:
    """Name of the field of a stage counted from 0, or of the average for -1."""
    return POOLED_STAGE if stage == -1 else f"{FEATURES}_{stage + 1}"
