"""RandAugment (Cubuk et al. 2020): torchvision's operations, each applied once to all records that drew it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_OPERATIONS = 2
"""Operations per image, as in the paper."""

Drawn = tuple[str, int]
"""Name of an operation of torchvision's space, and the sign of its magnitude."""


def randaugment(images: Tensor, magnitude: int, seeds: Sequence[int]) -> Tensor:
    """Apply torchvision's RandAugment to each image f32 [B, 3, h, w] in [0, 1], with a separate seed per image.

    Each record is changed as by torchvision's transform after `torch.manual_seed(seed)`. Translations are relative to
    the side, so equal seeds have the same effect at any size. On a GPU every step is synchronized, because torchvision
    creates the matrices of its geometric operations on the host.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment  # the import takes seconds

    # Bilinear as in the paper's code, because torchvision's default is nearest.
    transform = RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)
    space = transform._AUGMENTATION_SPACE
    signed = {name: is_signed for name, (_, is_signed) in space.items()}
    drawn = [draw_operations(signed, seed) for seed in seeds]
    images = images.clone()
    for turn in range(NUM_OPERATIONS):
        for (name, sign), rows in group_by_operation([of_record[turn] for of_record in drawn]):
            values = space[name][0](transform.num_magnitude_bins, *images.shape[-2:])
            changed = transform._apply_image_or_video_transform(
                images[rows],
                name,
                0.0 if values is None else sign * float(values[magnitude]),
                interpolation=transform.interpolation,
                fill=transform._fill,
            )
            images[rows] = changed
    return images


def draw_operations(signed: dict[str, bool], seed: int) -> list[Drawn]:
    """Draw the operations of one record from its seed, in the order in which torchvision draws.

    signed  operations to choose from, with True where the sign of the magnitude is drawn as well
    """
    generator = torch.Generator().manual_seed(seed)
    names = list(signed)
    drawn = []
    for _ in range(NUM_OPERATIONS):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        negative = signed[name] and bool(torch.rand((), generator=generator) <= 0.5)
        drawn.append((name, -1 if negative else 1))
    return drawn


def group_by_operation(drawn: Sequence[Drawn]) -> list[tuple[Drawn, list[int]]]:
    """Return each operation with the rows that drew it, without those that change nothing."""
    groups: dict[Drawn, list[int]] = {}
    for row, operation in enumerate(drawn):
        if operation[0] != "Identity":
            groups.setdefault(operation, []).append(row)
    return list(groups.items())
