"""Where the objects are in a batch's views: what explanations are evaluated by, and guided teachers taught by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.core.labels import has_many
from pipeline.core.records import Batch
from pipeline.loading.geometry import canonical_from_view, warp

RegionKind = Literal["boxes", "masks"]


def regions_of(batch: Batch, classes: Tensor, kind: RegionKind, size: tuple[int, int]) -> Tensor:
    """Where the objects of the given classes [n] are in the batch's view at (height, width) `size`.

    bool [n, height, width]; nowhere where a record has no region. Masks show the one label's object; of many
    labels their values are the classes + 1.
    """
    many = has_many(batch.labels)
    frame = (batch.inputs.shape[-2], batch.inputs.shape[-1])
    if kind == "boxes" and batch.canonical_from_view is None:
        frame = size  # nothing moves: the boxes' corners are cut to the pixels that are evaluated
    if kind == "masks":
        assert batch.masks is not None
        masks = batch.masks[:, 0]
        regions = masks == classes[:, None, None] + 1 if many else masks > 0
    else:
        boxes = [record_boxes.cpu() for record_boxes in batch.boxes]
        regions = box_regions(boxes, classes.cpu(), frame).to(batch.inputs.device)
    if many:
        regions = regions & (classes >= 0)[:, None, None]
    if batch.canonical_from_view is not None or size != frame:
        regions = warp(regions[:, None].float(), canonical_from_view(batch), size)[:, 0] > 0.5
    return regions


def box_regions(boxes: Sequence[Tensor], labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The union of each record's boxes of its own class, bool [n, H, W].

    boxes   a record's f32 [m, 5]: label and corners x0, y0, x1, y1 in [-1, 1]
    labels  i64 [n]
    Corners are cut down to whole pixels; a box covers them half-open.
    """
    regions = torch.zeros(len(boxes), *size, dtype=torch.bool)
    extent = torch.tensor([size[1], size[0], size[1], size[0]])
    for region, record_boxes, label in zip(regions, boxes, labels.tolist(), strict=True):
        own = record_boxes[record_boxes[:, 0] == label, 1:]
        # The small term undoes rounding of corners that are whole pixels.
        pixels = ((own + 1) / 2 * extent + 1e-3).floor().clamp(min=0).long()
        for x0, y0, x1, y1 in pixels.tolist():
            region[y0:y1, x0:x1] = True
    return regions
