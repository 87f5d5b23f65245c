"""A stand-in teacher that takes a fixed time per batch and has maps on a grid of 7 x 7 at any image size."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from permafrost.config.models import ModelConfig
from permafrost.models.classifier import Classifier, GapLinear, Provider


@dataclass(frozen=True, kw_only=True)
class StandInConfig(ModelConfig):
    """Stand-in for a network whose time is that of its accelerator, in which the process only waits."""

    implementation: ClassVar[str] = "tests.benchmarks.stand_in:PROVIDER"

    kind: Literal["stand_in"] = "stand_in"
    name: str = "stand_in"
    weights: str | None = "random"
    grid: Annotated[int, Ge(1)] = 7
    """Rows and columns of its features, and therefore of its maps."""
    latency_seconds: Annotated[float, Ge(0)] = 0.0
    """Time per forward pass."""


class StandIn(Classifier):
    """Linear classifier on the mean colors of the image's cells."""

    def __init__(self, config: StandInConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(3, num_classes)

    @property
    def network(self) -> StandIn:
        """The network itself."""
        return self

    @property
    def head(self) -> GapLinear:
        """Linear layer on the spatial average of the features."""
        return GapLinear(self.linear)

    def forward_trunk(self, images: Tensor) -> tuple[Tensor, None]:
        time.sleep(self.config.latency_seconds)
        return F.adaptive_avg_pool2d(images, self.config.grid), None

    def forward_head(self, features: Tensor, context: Tensor | None) -> Tensor:
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


PROVIDER = Provider(StandIn, lambda config: None)
