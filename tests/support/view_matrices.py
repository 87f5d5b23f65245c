"""Matrices of random views, for records of given aspect ratios, and of stored ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.windows import Views, complete_matrices


def sizes_of(aspects: Tensor) -> Tensor:
    """Return sizes (height, width) of images of these aspect ratios, [n, 2]."""
    return torch.stack([torch.ones_like(aspects), aspects], dim=1)


def matrices_of(schedule: ViewSchedule, epoch: int, start: int, aspects: Tensor) -> Tensor | None:
    """Return `canonical_from_view` of the views of consecutive positions, f32 [n, 3, 3]."""
    views = schedule.views(epoch, start, sizes_of(aspects))
    return None if views is None else views.canonical_from_view


def matrices_of_fields(values) -> np.ndarray:
    """Return `canonical_from_view` of the fields of stored views, f32 [..., 3, 3]."""
    windows, moves = (
        torch.from_numpy(np.array(values[name])) for name in ("canonical_from_window", "moves")
    )
    return Views.of(windows, complete_matrices(moves)).canonical_from_view.numpy()
