"""Pixel counts of active units and concepts over a whole set, as in the code of Bau et al. 2017.

    IoU[k, c] = inter[k, c] / (act[k, cat(c)] + lab[c] - inter[k, c] + 1e-10)

    inter[k, c]    pixels with label c where unit k is active
    lab[c]         pixels with label c; an image-level label counts for all pixels of its image
    act[k, cat]    pixels where unit k is active, over the images in which one of these pixels has a label of the
                   category (mask), or in which any pixel has one (image), as in the paper's text

A pixel with the same label in several label images counts once. The blog of Han et al. defines an IoU per image and
interpolates the thresholded map. Their code does neither, and this module follows the code.

Shape letters: U units, C labels, G categories, L label images, s t their height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.interpretability.concepts import NO_CONCEPT, Labels

_EPS = 1e-10

Presence = Literal["mask", "image"]


def firing_mask(activations: Tensor, thresholds: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of active units, bool [U, s, t] at (height, width) `size`.

    Activations are upsampled bilinearly, and a unit is active where they are strictly above its threshold. A unit that
    is 0 almost everywhere has the threshold 0, and is not active where it is 0.

    activations  [U, h, w] of one image
    thresholds   [U]
    """
    finer = F.interpolate(activations[None], size, mode="bilinear", align_corners=False)[0]
    return finer > thresholds[:, None, None]


@dataclass(frozen=True)
class OverlapCounts:
    """Counts over some images, all i64."""

    inter: Tensor
    """Pixels [U, C] of each unit and label."""
    lab: Tensor
    """Pixels [C] of each label."""
    act: Tensor
    """Pixels [U, G] of each unit and category."""

    @classmethod
    def zeros(cls, units: int, labels: Labels) -> OverlapCounts:
        """Counts of an empty set."""
        count, categories = len(labels.names), len(labels.categories)
        return cls(
            torch.zeros(units, count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(units, categories, dtype=torch.int64),
        )

    def count(
        self,
        masks: Tensor,
        layers: Tensor,
        whole: tuple[int, ...],
        labels: Labels,
        presence: Presence = "mask",
    ) -> None:
        """Add one image, in place.

        masks   bool [U, s, t], masks of active units
        layers  i64 [L, s, t], labels of pixels
        whole   labels of the image
        """
        present, there = _labeled(layers, whole)
        fired = masks.flatten(1)
        # The counts within one image are below 2^24, so they are exact in float32.
        counts = fired.float() @ there.float().T  # [U, present]
        categories = [labels.category_of[label] for label in present]
        of_category = counts.new_zeros(len(present), len(labels.categories))
        of_category[range(len(present)), categories] = 1
        seen = counts if presence == "mask" else torch.ones_like(counts)
        self.inter[:, present] += counts.long().cpu()
        self.lab[present] += there.sum(dim=1).cpu()
        self.act.add_((fired.sum(dim=1)[:, None] * (seen @ of_category > 0)).cpu())

    def iou(self, labels: Labels) -> Tensor:
        """Compute the IoU f64 [U, C], 0 for the label of no concept."""
        inter = self.inter.double()
        act = self.act.double()[:, list(labels.category_of)]
        iou = inter / (act + self.lab.double() - inter + _EPS)
        iou[:, NO_CONCEPT] = 0
        return iou


def _labeled(layers: Tensor, whole: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Labels of an image and the mask of each: bool [labels, s t]."""
    present = sorted({*torch.unique(layers).tolist(), *whole} - {NO_CONCEPT})
    pixels = layers.flatten(1)
    everywhere = torch.ones(pixels.shape[1], dtype=torch.bool, device=layers.device)
    there = [everywhere if label in whole else (pixels == label).any(dim=0) for label in present]
    return present, torch.stack(there) if there else everywhere[None][:0]
