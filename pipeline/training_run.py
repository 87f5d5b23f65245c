"""A whole training, from its parts to the last epoch; what teach and distill have in common."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipeline.config import ConfigError
from pipeline.explainers import DEFAULT_EXPLAINER, EXPLAINERS
from pipeline.geometry import downscale
from pipeline.models import build_model
from pipeline.seeds import derive_seed
from pipeline.stream import TrainingStream
from pipeline.training import Training, build_optimizer, fit, resolve_device
from pipeline.views import ViewSchedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from pipeline.config import AugmentConfig, ModelConfig, OptimizerConfig, TrainerConfig
    from pipeline.losses.terms import DistillationLoss
    from pipeline.models.classifier import Classifier
    from pipeline.stream import StoreDataset


logger = logging.getLogger("permafrost.training")

MAX_DOWNSCALE = 1.2
"""Frame pixels per view pixel; a bilinear fetch aliases above it."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides how a training goes."""

    dataset: StoreDataset
    model: ModelConfig
    num_classes: int
    loss: DistillationLoss
    augment: AugmentConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    seed: int
    explainer: str = DEFAULT_EXPLAINER
    teacher_weights: tuple[float, ...] = ()
    """See Training."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the student's view."""
        size = self.augment.size
        return self.dataset.store.size if size is None else (size, size)


def train_to_end(
    plan: TrainingPlan, folder: Path, on_epoch: Callable[[int, str], None]
) -> Classifier:
    """The trained network; continues from the folder's checkpoint where there is one.

    The seed is split once: initialisation, order and views each have their own.
    """
    if plan.trainer.num_threads is not None:
        torch.set_num_threads(plan.trainer.num_threads)
    if plan.loss.needs_labels and not (plan.dataset.columns["label"] >= 0).any():
        raise ConfigError(
            "none of the records has a label of the network's classes, and the loss reads labels: choose a "
            "method without them (method.lambda_ce=0) or data with one label a record"
        )
    device = resolve_device("trainer.device", plan.trainer.device)
    torch.manual_seed(derive_seed(plan.seed, "initialisation"))
    model = build_model(plan.model, plan.num_classes).to(device)
    loss = plan.loss.to(device)
    parameters = [*model.parameters(), *loss.parameters()]
    height, width = plan.dataset.store.size
    aspects = plan.dataset.aspects
    one_aspect = bool((aspects == width / height).all())
    views = ViewSchedule(plan.augment, (height, width), plan.seed, one_aspect=one_aspect)
    worst = worst_downscale(views, plan.input_size, aspects)
    if worst > MAX_DOWNSCALE:
        logger.warning(
            "views shrink the canonical frame of %dx%d up to %.1f times and alias above %.1f: "
            "pack the store with a smaller frame, or raise augment.size",
            *views.size,
            worst,
            MAX_DOWNSCALE,
        )
    stream = TrainingStream(
        plan.dataset,
        views,
        batch_size=plan.trainer.batch_size,
        seed=plan.seed,
        loader_processes=plan.trainer.loader_processes,
    )
    training = Training(
        model=model,
        loss=loss,
        optimizer=build_optimizer(plan.optimizer, parameters),
        explain=EXPLAINERS[plan.explainer],
        teacher_weights=plan.teacher_weights,
    )
    fit(
        training,
        stream,
        trainer=plan.trainer,
        lr=plan.optimizer.lr,
        input_size=plan.input_size,
        folder=folder,
        on_epoch=on_epoch,
    )
    return model


def worst_downscale(views: ViewSchedule, input_size: tuple[int, int], aspects: Tensor) -> float:
    """Canonical pixels per pixel of a view of (height, width) `input_size`, at the worst of 256 views.

    aspects  [n]: width / height of originals, of which the first 256 are taken
    """
    matrices = views.views(0, 0, aspects[:256])
    if matrices is None:
        matrices = torch.eye(3)[None]
    return float(downscale(matrices, views.size, input_size).max())
