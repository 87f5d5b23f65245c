"""Frames, maps and matrices for the tests of views."""

import torch

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.core.batches import Batch
from permafrost.loading.random_views import build_operations, draw_in_parts

CROP = OperationConfig(kind="resized_crop", scale=(0.08, 1.0))


FLIP = OperationConfig(kind="horizontal_flip", p=0.5)


PAD_CROP = OperationConfig(kind="pad_crop", padding=4)


ROTATION = OperationConfig(kind="rotation", p=1.0, degrees=30.0)


AFFINE = OperationConfig(
    kind="affine", p=1.0, degrees=15.0, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10.0
)


def draw_views(operations, count, size, seed):
    """Draw the matrices f64 [count, 3, 3] of Kornia's operations, one after the other."""
    (views,) = draw_in_parts([operations], count, size, seed)
    return views


def draw(*operations, count, size=(64, 64), seed=0):
    """Draw views f32 [count, 3, 3] as in training."""
    built = build_operations(AugmentOptions(operations=operations), size)
    return draw_views(built, count, size, seed).float()


def matrix(scale_x=1.0, scale_y=1.0, shift_x=0.0, shift_y=0.0):
    """Matrix f32 [1, 3, 3] of x -> scale_x * x + shift_x, and likewise for y."""
    return torch.tensor([[[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]]])


def cell_centers(count):
    return (2 * torch.arange(count) + 1) / count - 1


def float_noise(*shape, seed=0):
    """White noise in [0, 1), the sharpest possible image."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(inputs, view=None, targets=()):
    count = len(inputs)
    return Batch(
        keys=tuple(f"record-{row}" for row in range(count)),
        record_index=torch.arange(count),
        inputs=inputs,
        canonical_from_view=view,
        view_index=torch.full((count,), -1),
        original_size=torch.full((count, 2), 32.0),
        labels=torch.zeros(count, dtype=torch.int64),
        groups=torch.full((count,), -1),
        targets=targets,
    )


def frames_of_size(count, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
