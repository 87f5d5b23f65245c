"""Values of a pass as stored, decoded to float32 on their own device, just before they are used.

Until then they keep the size they have on disk: in queues of loader processes, in pinned memory and on the bus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.core.records import StoredTargets
from permafrost.store.codecs import INT8_STEPS


def decode_maps(stored: StoredTargets) -> Tensor:
    """Decode maps to f32 [B, E, A, h, w] with max-abs 1 (or all zero)."""
    assert stored.maps is not None
    return _decode_unit(stored.maps)


def decode_intermediates(stored: StoredTargets) -> dict[str, Tensor]:
    """Decode intermediates to f32 in their units."""
    return {
        name: _decode_unit(values) * _unsqueeze_like(stored.scales[name], values)
        if name in stored.scales
        else values.float()
        for name, values in stored.intermediates.items()
    }


def _decode_unit(stored: Tensor) -> Tensor:
    """`store.codecs.decode_unit` for tensors, with the same bits on every device."""
    values = stored.float()
    if stored.dtype != torch.int8:
        return values
    # On a GPU, division by a Python number would multiply by its rounded reciprocal.
    return values / torch.full((), INT8_STEPS, dtype=values.dtype, device=values.device)


def _unsqueeze_like(scale: Tensor, values: Tensor) -> Tensor:
    """Append dimensions of size 1, because a scale has the first dimensions of its values."""
    return scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
