"""Trainings with a live teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from permafrost.config.methods import MethodConfig
from permafrost.config.models import CifarModelConfig, ModelConfig
from permafrost.config.training import OptimizerOptions
from permafrost.loading.geometry import TargetRequest, view_images
from permafrost.losses.base import Needs, StudentOutput, build_loss
from permafrost.models.classifier import NO_INTERMEDIATES, Classifier
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.targets import LiveTeacher
from tests.support.batches import FRAME, NUM_CLASSES, live_batch

STUDENT = CifarModelConfig(name="resnet8", width=4)


TEACHER = CifarModelConfig(name="resnet14", width=6)


NO_NEEDS = Needs()


def seeded_model(config: ModelConfig, seed: int) -> Classifier:
    torch.manual_seed(seed)
    return build_model(config, NUM_CLASSES)


def live_teacher(
    needs: Needs = NO_NEEDS, config: ModelConfig = TEACHER, seed: int = 1
) -> LiveTeacher:
    return LiveTeacher("teacher", freeze(seeded_model(config, seed)), gradcam, FRAME, needs=needs)


def training_with_live_teacher(
    method: MethodConfig, *, student: ModelConfig = STUDENT, seed: int = 0, **teacher: Any
) -> Training:
    """Training of a student with a live teacher, set up as in a run."""
    model = seeded_model(student, seed)
    loss = build_loss(method)
    targets = live_teacher(loss.needs, **teacher)
    if loss.needs.intermediates != NO_INTERMEDIATES:
        batch = live_batch(0)
        with torch.no_grad():
            output = copy.deepcopy(model).eval()(
                view_images(batch, FRAME), loss.needs.intermediates
            )
        (example,) = targets(batch, TargetRequest((4, 4), with_maps=False))
        loss.build(StudentOutput(output=output), example)
    parameters = [*model.parameters(), *loss.parameters()]
    return Training(
        model=model,
        loss=loss,
        optimizer=build_optimizer(OptimizerOptions(lr=0.01), parameters),
        targets=targets,
    )


def gaussian_maps(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
