"""A student that takes steps on batches which are held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from permafrost.config.models import ModelConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.records import Batch
from permafrost.loading.loader import TrainLoader
from permafrost.loading.transfer import move_batch
from permafrost.losses.build import build_loss
from permafrost.models.explainers.explain import DEFAULT_EXPLAINER, explainer_named
from permafrost.models.providers import build_model
from permafrost.training.live_targets import LiveTeacher
from permafrost.training.state import ComputeSettings, Training, build_optimizer
from permafrost.training.step import train_step
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
    ) -> None:
        torch.manual_seed(0)
        model = build_model(config, CLASSES).to(device)
        half = precision == "float16"
        self.training = Training(
            model=model,
            loss=build_loss(method).to(device),
            optimizer=build_optimizer(OptimizerOptions(), list(model.parameters()), fused=half),
            explain=explainer_named(explainer),
            compute_settings=ComputeSettings(
                precision=getattr(torch, precision), channels_last=device.type == "cuda"
            ),
        )
        if teacher is not None:
            self.training.targets = teacher
        self.batches = batches
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
        with self.meter:
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


class ReadingStudent(Student):
    """Student whose batches are read from a store during its steps, as those of a training are."""

    def __init__(
        self,
        config: ModelConfig,
        method: Any,
        loader: TrainLoader,
        device: torch.device,
        *,
        steps: int,
        input_size: int,
        precision: str,
    ) -> None:
        super().__init__(
            config, method, (), device, steps=steps, input_size=input_size, precision=precision
        )
        self.loader = loader
        self.reading = self._read()

    @property
    def images(self) -> int:
        """Images of one call."""
        return self.steps * self.loader.batches.batch_size

    def step(self) -> None:
        """Take the next step. The host's part is the time in which the batch is waited for."""
        with self.timeline.on_host("host"):
            batch = next(self.reading)
        with self.timeline.on_device("compute"):
            train_step(self.training, batch, self.size, clip_norm=1.0)

    def _read(self) -> Iterator[Batch]:
        for epoch in count():
            yield from self.loader.epoch(epoch, device=self.device)
