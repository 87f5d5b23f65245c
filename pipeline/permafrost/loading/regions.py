"""Regions of objects in the view of a batch, from boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from permafrost.core.batches import Batch
from permafrost.core.label_forms import has_many
from permafrost.loading.geometry import canonical_from_view, warp
from permafrost.loading.transfer import copy_to

RegionKind = Literal["boxes", "masks"]
"""Regions of objects: their boxes, or masks."""


def regions_of(batch: Batch, classes: Tensor, kind: RegionKind, size: tuple[int, int]) -> Tensor:
    """Compute the regions of the objects of the given classes in the batch's view.

    If a record has one label, its mask is that of the label's object. If it has many, mask values are class + 1.

    Args:
        batch: Batch of n records with their masks or boxes.
        classes: i64 [n]; for boxes on the host, where they are read, or the device is waited for.
        kind: Source of the regions, boxes or masks.
        size: (height, width) of the regions.

    Returns:
        Bool [n, height, width], all False for a record without a region.
    """
    many = has_many(batch.labels)
    frames = batch.masks if batch.has_windows and batch.masks is not None else batch.inputs
    # Without a transform, box corners are rounded to pixels of the evaluated size.
    are_untransformed = kind == "boxes" and batch.canonical_from_view is None
    frame = size if are_untransformed else (frames.shape[-2], frames.shape[-1])
    if kind == "masks":
        assert batch.masks is not None
        masks, classes = batch.masks[:, 0], copy_to(classes, batch.inputs.device)
        regions = masks == classes[:, None, None] + 1 if many else masks > 0
    else:
        classes = classes.cpu()
        regions = box_regions(batch.boxes, classes, frame)
    if many:
        regions = regions & (classes >= 0)[:, None, None]
    regions = copy_to(regions, batch.inputs.device)
    if batch.canonical_from_view is not None or size != frame:
        matrices = canonical_from_view(batch)
        regions = warp(regions[:, None].float(), matrices, size, moves=batch.moves)[:, 0] > 0.5
    return regions


def box_regions(boxes: Sequence[Tensor], labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the union of each record's boxes with its label.

    Corners are rounded to the nearest edges of pixels, and a box has one pixel at least in each direction.

    Args:
        boxes: f32 [m, 5] for each record: label and corners x0, y0, x1, y1 in [-1, 1].
        labels: i64 [n].
        size: Height and width of the regions.

    Returns:
        Bool [n, height, width].
    """
    regions = torch.zeros(len(boxes), *size, dtype=torch.bool)
    extent = torch.tensor([size[1], size[0]])
    for region, record_boxes, label in zip(regions, boxes, labels.tolist(), strict=True):
        label_boxes = record_boxes[record_boxes[:, 0] == label, 1:]
        edges = ((label_boxes.reshape(-1, 2, 2) + 1) / 2 * extent + 0.5).floor().long()
        first = edges[:, 0].clamp(min=0).minimum(extent - 1)
        last = edges[:, 1].maximum(first + 1)
        for (x0, y0), (x1, y1) in zip(first.tolist(), last.tolist(), strict=True):
            region[y0:y1, x0:x1] = True
    return regions
