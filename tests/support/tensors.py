"""Random tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(side: int, records: int = 2) -> Tensor:
    return torch.rand(records, 3, side, side, generator=torch.Generator().manual_seed(0))
