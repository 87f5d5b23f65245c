"""Cost of a student's step with frozen explanations, against labels alone and against a live teacher."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config.augment import AugmentOptions, OperationConfig
from pipeline.config.methods import E2KDConfig, LabelsConfig
from pipeline.config.models import CifarModelConfig
from pipeline.config.training import OptimizerOptions
from pipeline.loading.dataset import StoreDataset
from pipeline.loading.loader import TrainLoader
from pipeline.loading.selection import rows_of_split
from pipeline.loading.views import ViewSchedule
from pipeline.losses.build import build_loss
from pipeline.models.explainers.gradcam import gradcam
from pipeline.models.providers import build_model, freeze
from pipeline.store.reader import Store
from pipeline.training.live_targets import LiveTeacher
from pipeline.training.state import Training, build_optimizer
from pipeline.training.step import train_step
from stages import precompute
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, precompute_config, write_tars

SIZE = (32, 32)
BATCH = 32
ROUNDS = 60
STUDENT = CifarModelConfig(name="resnet20")
TEACHER = CifarModelConfig(name="resnet56", classes=CLASSES, weights="random")
VIEWS = AugmentOptions(
    operations=(OperationConfig(kind="pad_crop"), OperationConfig(kind="horizontal_flip"))
)


def step_figures(folder: Path) -> list[Figure]:
    """Measure frozen e2KD against labels only, and against the same e2KD with its ResNet-56 in the loop."""
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", 40 * BATCH, 32), folder / "store"
    precompute.run(precompute_config(tars, path))
    store = Store(path)
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), store.open_passes())
    stream = TrainLoader(dataset, ViewSchedule(VIEWS, SIZE, seed=0), batch_size=BATCH, seed=0)
    batches = list(stream.epoch(0))
    teacher = LiveTeacher(TEACHER.name, freeze(build_model(TEACHER, CLASSES)), gradcam, SIZE)
    frozen = Steps(E2KDConfig(lambda_map=5.0), batches)
    live = Steps(E2KDConfig(lambda_map=5.0), batches, teacher)
    labels = Steps(LabelsConfig(), batches)

    def ask() -> None:
        with torch.no_grad():
            teacher.model(batches[0].inputs.float() / 255)

    milliseconds = {"unit": "ms/step", "scale": 1e3}
    teacher_cost = median(a / b for a, b in in_turn(ask, frozen, ROUNDS // 3))
    return [
        figure(
            "frozen_e2kd_step_vs_labels",
            in_turn(frozen, labels, ROUNDS, warm_up=3),
            faster=False,
            aim="<= 1.05",
            **milliseconds,
        ),
        figure(
            "frozen_vs_live_e2kd_step",
            in_turn(frozen, live, ROUNDS, warm_up=3),
            faster=True,
            aim=f">= {0.9 * (1 + teacher_cost):.2f}",
            **milliseconds,
        ),
    ]


class Steps:
    """Callable that takes a student's next step on the next batch."""

    def __init__(self, method: Any, batches: list[Any], teacher: LiveTeacher | None = None) -> None:
        torch.manual_seed(0)
        model = build_model(STUDENT, CLASSES)
        self.training = Training(
            model=model,
            loss=build_loss(method),
            optimizer=build_optimizer(OptimizerOptions(), list(model.parameters())),
        )
        if teacher is not None:
            self.training.targets = teacher
        self.batches = batches
        self.taken = 0

    def __call__(self) -> None:
        batch = self.batches[self.taken % len(self.batches)]
        train_step(self.training, batch, SIZE, clip_norm=1.0)
        self.taken += 1
