"""Random tensors, and arrays encoded as tensors are."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.store.codecs import encode_unit


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(side: int, records: int = 2) -> Tensor:
    return torch.rand(records, 3, side, side, generator=torch.Generator().manual_seed(0))


def smooth_images(records: int, size: int = 32) -> Tensor:
    """Images in [0, 1] of a few large areas, which survive a change of their size."""
    coarse = torch.rand(records, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def encode_maxabs(values, dtype, axes):
    """Encode an array as `encode_unit` encodes a tensor."""
    stored, scale = encode_unit(torch.from_numpy(np.ascontiguousarray(values)), dtype, axes)
    return stored.numpy(), scale.numpy()
