"""Distillation of features through a trained linear map: dense features (FeaturesLoss) and embeddings (EmbeddingLoss).

The map goes from the student's features to the teacher's. It is trained with the student and not exported. Relations
between the embeddings of a batch (RKD) need no map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.methods import EmbeddingConfig, FeaturesConfig
from permafrost.core.batches import AnyLabels, Targets
from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.loading.geometry import coverage_on
from permafrost.losses.base import Needs, StudentOutput, Term, TrainingRecords
from permafrost.losses.feature_kd import (
    FeatureKDLoss,
    covered_mse,
    covered_pool,
    pool_cells,
    stored_stages,
    weighted_mean,
)
from permafrost.losses.map_distances import unit_scale
from permafrost.losses.shapes import require_same_shape
from permafrost.models.classifier import Intermediates, to_float32

# ---- features --------------------------------------------------------------------------------------


def covered_cosine(student: Tensor, teacher: Tensor, coverage: Tensor | None) -> Tensor:
    """Compute the mean of 1 - cosine over channels, over records and cells, weighted by the coverage.

    Args:
        student: [B, C, h, w]. Gradients flow here.
        teacher: [B, C, h, w].
        coverage: [B, 1, h, w] in [0, 1], or None to weight all cells alike.
    """
    require_same_shape("covered_cosine", student, teacher, 4)
    student, teacher = (
        F.normalize(unit_scale(features, (1,)), dim=1) for features in (student, teacher)
    )
    distance = 1 - (student * teacher).sum(dim=1, keepdim=True)
    return distance.mean() if coverage is None else weighted_mean(distance, coverage)


class FeaturesLoss(FeatureKDLoss):
    """Mean over pairs of stages of the distance of the student's mapped features from the teacher's.

    If the grids differ, the finer features are averaged over the cells of the coarser grid, over that part of each
    cell which lies inside of what the teacher received.
    """

    term = "features"
    term_needs = Needs(intermediates=Intermediates(stages=True), outputs=(FEATURES,))
    config: FeaturesConfig

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__(config)
        self.maps = nn.ModuleList()
        """1x1 convolution of each pair from the student's channels to the teacher's, created by `build`."""
        self.pairs: list[tuple[int, str]] = []
        """Index of the student's stage and field of the teacher's, in the order of the maps."""

    def build(self, student: StudentOutput, targets: Targets) -> None:
        if self.weight == 0:
            return
        student_stages = list(range(1, len(student.output.stages) + 1))
        stored = stored_stages(targets)
        teacher_stages = self.config.teacher_stages or self.config.stages
        students = _numbers("stages", self.config.stages, student_stages, "the student has")
        option = "teacher_stages" if self.config.teacher_stages else "stages"
        teachers = _numbers(option, teacher_stages, stored, "the targets have the teacher's")
        self.pairs = [
            (number - 1, f"{FEATURES}_{teacher_stage}")
            for number, teacher_stage in zip(students, teachers, strict=True)
        ]
        self.maps = nn.ModuleList(
            nn.Conv2d(
                student.output.stages[index].output.shape[1],
                targets.intermediates[name].shape[1],
                1,
            )
            for index, name in self.pairs
        )

    def on_train_start(self, records: TrainingRecords) -> None:
        if self.weight > 0:
            self.require_one_teacher(records)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        distance = covered_cosine if self.config.distance == "cosine" else covered_mse
        losses = []
        for convolution, (index, name) in zip(self.maps, self.pairs, strict=True):
            features = to_float32(student.output.stages[index].output)
            teacher, coverage = targets.intermediates[name].detach(), targets.coverage.get(name)
            size = (
                min(features.shape[2], teacher.shape[2]),
                min(features.shape[3], teacher.shape[3]),
            )
            share = None if coverage is None else pool_cells(coverage, size)
            inside = None
            if name in targets.placements and features.shape[2:] != size:
                grid = (features.shape[2], features.shape[3])
                inside = coverage_on(targets, name, grid).to(features.dtype)
            # The map is linear, so it is applied to the averages.
            mapped = to_float32(convolution(covered_pool(features, inside, size)))
            pooled = self.standardized(targets, name, covered_pool(teacher, coverage, size))
            losses.append(distance(mapped, pooled, share))
        return torch.stack(losses).mean()


def _numbers(option: str, numbers: tuple[int, ...], stages: list[int], have: str) -> list[int]:
    """Resolve numbers counted from -1 at the deepest of `stages`. Raises ConfigError for a missing stage."""
    resolved = [stages[number] if -len(stages) <= number < 0 else number for number in numbers]
    require(
        set(resolved) <= set(stages),
        f"method.{option}={list(numbers)}: {have} stages {', '.join(map(str, stages))}; name some of these, or count "
        "from -1 at the deepest",
    )
    return resolved


# ---- embedding -------------------------------------------------------------------------------------


def distance_relations(embeddings: Tensor) -> Tensor:
    """Compute the distances of all pairs of records divided by their mean (RKD, eq. 5 and 6).

    Args:
        embeddings: [B, d].

    Returns:
        [B (B - 1) / 2].
    """
    distances = F.pdist(embeddings)
    return distances / distances.mean().clamp(min=_EPS)


def angle_relations(embeddings: Tensor) -> Tensor:
    """Compute the cosines of the angles at each record j between any two others i and k (RKD, eq. 8).

    The entries with i = j, j = k or i = k are the same for all embeddings, 0 or 1.

    Args:
        embeddings: [B, d].

    Returns:
        [B, B, B] by (j, i, k).
    """
    directions = F.normalize(embeddings[None] - embeddings[:, None], dim=2)  # [j, i, d]
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    cosines = (directions @ directions.transpose(1, 2)).masked_fill(itself, 1.0)
    return cosines.masked_fill(itself[:, None, :] | itself[:, :, None], 0.0)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber distance of `distance_relations`, a mean over pairs of different records (RKD-D).

    Args:
        student: [B, d]. Gradients flow here.
        teacher: [B, d'], constant.
    """
    return F.smooth_l1_loss(distance_relations(student), distance_relations(teacher.detach()))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the Huber distance of `angle_relations`, a mean over triples of different records (RKD-A).

    Args:
        student: [B, d]. Gradients flow here.
        teacher: [B, d'], constant.
    """
    count = len(student)
    total = F.smooth_l1_loss(
        angle_relations(student), angle_relations(teacher.detach()), reduction="sum"
    )
    return total / max(1, count * (count - 1) * (count - 2))


_EPS = 1e-12


class EmbeddingLoss(FeatureKDLoss):
    """Distance of the student's mapped pooled features from the teacher's, and distances of their relations.

    Relations are those of the records of all ranks. Each rank computes all of them.
    """

    term = "embedding"
    term_needs = Needs(intermediates=Intermediates(pooled=True), outputs=("pooled",))
    config: EmbeddingConfig

    @property
    def needs(self) -> Needs:
        config = self.config
        is_read = max(config.lambda_embedding, config.lambda_distance, config.lambda_angle) > 0
        specific_needs = self.term_needs if is_read else Needs()
        return replace(specific_needs, labels=config.lambda_ce > 0, logits=config.lambda_kd > 0)

    def build(self, student: StudentOutput, targets: Targets) -> None:
        if self.weight > 0:
            pooled, teacher = _embeddings(student, targets)
            self.map = nn.Linear(pooled.shape[1], teacher.shape[1])

    def on_train_start(self, records: TrainingRecords) -> None:
        if self.weight > 0:
            self.require_one_teacher(records)

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield from super().terms(student, targets, labels)

        def relation(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
            return lambda: loss(
                *map(self.distributed.gather_with_gradient, _embeddings(student, targets))
            )

        yield Term("distance", self.config.lambda_distance, relation(distance_loss))
        yield Term("angle", self.config.lambda_angle, relation(angle_loss))

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        pooled, teacher = _embeddings(student, targets)
        mapped, teacher = (
            to_float32(self.map(pooled)),
            self.standardized(targets, "pooled", teacher),
        )
        if self.config.distance == "cosine":
            return 1 - F.cosine_similarity(mapped, teacher, dim=1).mean()
        return F.mse_loss(mapped, teacher)


def _embeddings(student: StudentOutput, targets: Targets) -> tuple[Tensor, Tensor]:
    """Return both networks' pooled features, f32 [B, d] each, the teacher's constant."""
    pooled = to_float32(student.output.require("pooled"))
    return pooled, targets.intermediates["pooled"].detach().to(pooled)
