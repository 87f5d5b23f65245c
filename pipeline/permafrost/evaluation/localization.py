"""Localization of an explanation on the object: energy pointing game and IoU.

Both use positive attributions only, and compare maps with regions at the input's resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.losses.guided import MIN_ENERGY


def energy_pointing_game(maps: Tensor, regions: Tensor) -> Tensor:
    """Share of each map's positive mass inside its region (Wang et al. 2020), [n].

    maps     [n, H, W]
    regions  bool [n, H, W]
    """
    positive = maps.clamp(min=0)
    total = positive.sum(dim=(1, 2))
    inside = (positive * regions).sum(dim=(1, 2))
    return torch.where(total < MIN_ENERGY, 0.0, inside / total.clamp(min=MIN_ENERGY))


def uniform_score(regions: Tensor) -> Tensor:
    """EPG and IoU of a uniform map, the chance level of both: the share of the area inside each region, [n].

    regions  bool [n, H, W]
    """
    return regions.float().mean(dim=(1, 2))


def localization_iou(maps: Tensor, regions: Tensor, threshold: float) -> Tensor:
    """Intersection over union of each region and {map scaled to [0, 1] > threshold}, [n].

    A constant positive map covers everything. The IoU of an empty union is 0.
    """
    positive = maps.clamp(min=0)
    low, high = positive.amin(dim=(1, 2), keepdim=True), positive.amax(dim=(1, 2), keepdim=True)
    low = torch.where(low == high, 0.0, low)
    scaled = (positive - low) / torch.where(high > low, high - low, 1.0)
    chosen = scaled > threshold
    intersection = (chosen & regions).sum(dim=(1, 2))
    union = (chosen | regions).sum(dim=(1, 2))
    return intersection / union.clamp(min=1)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Upsample maps [n, h, w] bilinearly to (H, W) `size`: [n, H, W]."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
