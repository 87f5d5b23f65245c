"""Batches on their way from loader processes.

Torch passes each tensor as a file of shared memory, which takes a tenth of a millisecond however small it is, and a
batch has a dozen small tensors, or one per record of boxes. These are sent in the message itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from permafrost.core.records import Batch
from permafrost.loading.transfer import map_leaves

_SMALL = 64 * 2**10
"""Size in bytes up to which a tensor is sent in the message."""


def pack_batch(batch: Batch) -> Batch:
    """Replace the small tensors of a batch by arrays, which are pickled as bytes, in a loader process."""
    packed: Batch = map_leaves(batch, _pack)
    return packed


def unpack_batch(batch: Batch) -> Batch:
    """Return the batch that `pack_batch` was given."""
    unpacked: Batch = map_leaves(batch, _unpack)
    return unpacked


def _pack(value: Any) -> Any:
    # The memory format of other tensors would not survive.
    is_sent = isinstance(value, Tensor) and value.is_contiguous() and value.nbytes <= _SMALL
    return value.numpy() if is_sent else value


def _unpack(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
