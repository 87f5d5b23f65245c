"""Random batches and the smallest network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from permafrost.config.models import CifarModelConfig
from permafrost.core.batches import Batch, StoredTargets
from permafrost.models.providers import build_model

FRAME = (16, 16)


GRID = (4, 4)


NUM_CLASSES = 3


MODEL = CifarModelConfig(name="resnet8", width=4)


FLIP = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))


def tiny_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(MODEL, NUM_CLASSES)


def random_frames(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, 3, *FRAME), generator=generator, dtype=torch.uint8)


def random_targets(seed: int) -> StoredTargets:
    generator = torch.Generator().manual_seed(seed)
    return StoredTargets(
        teacher="teacher",
        logits=torch.randn(4, NUM_CLASSES, generator=generator),
        target_class=torch.randint(0, NUM_CLASSES, (4, 1), generator=generator),
        maps=torch.rand(4, 1, 1, *GRID, generator=generator),
        map_from_canonical=torch.eye(3).repeat(4, 1, 1),
    )


def build_batch(inputs: Tensor, targets: StoredTargets | None, view: Tensor | None) -> Batch:
    """Batch whose records all have the same view."""
    return Batch(
        keys=tuple(f"record-{index}" for index in range(len(inputs))),
        record_index=torch.arange(len(inputs)),
        inputs=inputs,
        canonical_from_view=None if view is None else view.repeat(len(inputs), 1, 1),
        view_index=torch.full((len(inputs),), -1),
        original_size=torch.full((len(inputs), 2), 32.0),
        labels=torch.arange(len(inputs)) % NUM_CLASSES,
        groups=torch.full((len(inputs),), -1),
        targets=() if targets is None else (targets,),
    )


def random_batch(seed: int) -> Batch:
    return build_batch(random_frames(seed), random_targets(seed), FLIP)


def live_batch(seed: int) -> Batch:
    """Frames without stored targets, for a live teacher."""
    empty = StoredTargets(teacher="", logits=torch.zeros(4, NUM_CLASSES))
    return build_batch(random_frames(seed), empty, None)
