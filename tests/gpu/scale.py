"""Sizes of a run: full on a GPU, or tiny for testing the same code on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

from permafrost.config.models import CifarModelConfig, ModelConfig, TorchvisionModelConfig
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_timm.options import TimmModelConfig

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and networks."""

    is_tiny: bool
    images: int
    """Records of the store."""
    distinct: int
    """Number of different images, which repeat."""
    side: int
    """Side of an image in pixels."""
    input_size: int
    batch_size: int
    bcos_images: int
    bcos_batch_size: int
    rounds: int
    """Rounds in which a row and its baseline alternate."""
    steps: int
    """Training steps of each side of a round."""
    precision: str
    teacher: ModelConfig
    vit: ModelConfig
    bcos_teacher: ModelConfig
    student: ModelConfig
    bcos_student: ModelConfig

    @property
    def decode_threads(self) -> int:
        """Threads that decode images, in the pipeline and in the bare loop."""
        return 1 if self.is_tiny else max(1, min(16, (os.cpu_count() or 1) - 1))


_FULL_SIZE = {"weights": "random", "input_size": 224}
FULL = Scale(
    is_tiny=False,
    images=4096,
    distinct=256,
    side=256,
    input_size=224,
    batch_size=128,
    bcos_images=256,
    bcos_batch_size=64,
    rounds=5,
    steps=10,
    precision="bfloat16",
    teacher=TorchvisionModelConfig(name="resnet50", **_FULL_SIZE),
    vit=TimmModelConfig(name="vit_base_patch16_224", **_FULL_SIZE),
    bcos_teacher=BcosModelConfig(name="resnet50", **_FULL_SIZE),
    student=TorchvisionModelConfig(name="resnet18"),
    bcos_student=BcosModelConfig(name="resnet18"),
)
TINY = Scale(
    is_tiny=True,
    images=32,
    distinct=8,
    side=40,
    input_size=32,
    batch_size=8,
    bcos_images=16,
    bcos_batch_size=8,
    rounds=1,
    steps=1,
    precision="bfloat16",
    teacher=CifarModelConfig(name="resnet8", width=4, weights="random", input_size=32),
    vit=TimmModelConfig(name="vit_tiny_patch16_224", weights="random", input_size=32),
    bcos_teacher=BcosModelConfig(name="resnet8", width=4, weights="random", input_size=32),
    student=CifarModelConfig(name="resnet8", width=4),
    bcos_student=BcosModelConfig(name="resnet8", width=4),
)
