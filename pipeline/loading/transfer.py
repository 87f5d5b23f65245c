"""Copies of tensors and batches to the training device, for which the host does not wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.core.records import Batch, StoredTargets


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`, or return it if it is there."""
    is_pageable = device.type == "cuda" and tensor.device.type == "cpu"
    # A copy from pageable memory would synchronize with the device even if non_blocking.
    source = tensor.pin_memory() if is_pageable else tensor
    return source.to(device, non_blocking=True)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to `device`, except what is read on the host: boxes, and a second set of labels."""
    if device == batch.inputs.device:
        return batch
    moved: Batch = _move(replace(batch, boxes=(), host_labels=None), device)
    return replace(moved, boxes=batch.boxes, host_labels=batch.labels_on_host)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return copy_to(value, device)
    if isinstance(value, (Batch, StoredTargets)):
        names = value.__dataclass_fields__
        return type(value)(**{name: _move(getattr(value, name), device) for name in names})
    if isinstance(value, dict):
        return {name: _move(member, device) for name, member in value.items()}
    return tuple(_move(member, device) for member in value) if isinstance(value, tuple) else value
