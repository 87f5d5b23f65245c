"""A student that takes steps on batches which are held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from permafrost.config.models import ModelConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Batch
from permafrost.loading.transfer import move_batch
from permafrost.losses.base import build_loss
from permafrost.models.compute import ComputeSettings, deterministic_algorithms
from permafrost.models.explanations import DEFAULT_EXPLAINER, explainer_named
from permafrost.models.providers import build_model
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import train_step
from permafrost.training.targets import LiveTeacher
from tests.gpu.scale import CLASSES
from tests.gpu.timeline import Timeline, synchronize
from tests.gpu.utilization import UtilizationMeter


class Student:
    """Callable that takes a number of steps on the next batches, and waits for the device at the end."""

    def __init__(
        self,
        config: ModelConfig,
        method: Any,
        batches: Sequence[Batch],
        device: torch.device,
        *,
        steps: int,
        input_size: int,
        precision: str,
        teacher: LiveTeacher | None = None,
        explainer: str = DEFAULT_EXPLAINER,
        deterministic: bool = True,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        model = build_model(config, CLASSES).to(device)
        fused = device.type == "cuda" or precision == "float16"
        self.training = Training(
            model=model,
            loss=build_loss(method).to(device),
            optimizer=build_optimizer(OptimizerOptions(), list(model.parameters()), fused=fused),
            explain=explainer_named(explainer),
            compute_settings=ComputeSettings(
                precision=getattr(torch, precision),
                channels_last=device.type == "cuda",
                compile=compiled,
            ),
        )
        if teacher is not None:
            self.training.targets = teacher
        self.batches = batches
        self.deterministic = deterministic
        self.device = device
        self.steps = steps
        self.size = (input_size, input_size)
        self.timeline, self.meter = Timeline(device), UtilizationMeter(device)
        self.taken = 0

    @property
    def images(self) -> int:
        """Images of one call."""
        return self.steps * len(self.batches[0].keys)

    def __call__(self) -> None:
        with self.meter, deterministic_algorithms(self.device, enabled=self.deterministic):
            for _ in range(self.steps):
                self.step()
            synchronize(self.device)

    def step(self) -> None:
        """Take the next step, as the loop of a training does, without waiting for the device."""
        batch = self.batches[self.taken % len(self.batches)]
        with self.timeline.on_device("copy"):
            moved = move_batch(batch, self.device)
        with self.timeline.on_device("compute"):
            train_step(self.training, moved, self.size, clip_norm=1.0)
        self.taken += 1
