"""Pixels where units fire and where concepts are, counted over a whole set (Bau et al. 2017, as their code counts).

    IoU[k, c] = inter[k, c] / (act[k, cat(c)] + lab[c] - inter[k, c] + 1e-10)

    inter[k, c]    pixels where unit k fires and label c is
    lab[c]         pixels with label c; an image-level label counts for all pixels of its image
    act[k, cat]    pixels where unit k fires, in images where one of these carries a label of the category (mask), or
                   where any pixel does (image), as the paper's text has it

A pixel that has one label in several label images has it once. The blog of Han et al. writes an IoU an image, and
interpolates the thresholded map; their code does neither, and this follows it. Counts are integers, so parts of a set
add up exactly. Shape letters: U units, C labels, G categories, L label images, s t their height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.evaluators.dissection.concepts import NO_CONCEPT, Labels

_EPS = 1e-10

Presence = Literal["mask", "image"]


def firing_mask(activations: Tensor, thresholds: Tensor, size: tuple[int, int]) -> Tensor:
    """Where units fire, bool [U, s, t] at (height, width) `size`: upsampled bilinearly, then strictly above.

    A unit that is 0 almost everywhere has the threshold 0, and does not fire where it is 0.

    activations  [U, h, w] of one image
    thresholds   [U]
    """
    finer = F.interpolate(activations[None], size, mode="bilinear", align_corners=False)[0]
    return finer > thresholds[:, None, None]


@dataclass(frozen=True)
class OverlapCounts:
    """Over some images; all i64."""

    inter: Tensor
    """[U, C]."""
    lab: Tensor
    """[C]."""
    act: Tensor
    """[U, G]."""

    @classmethod
    def zeros(cls, units: int, labels: Labels) -> OverlapCounts:
        """Of no image."""
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

        masks   bool [U, s, t], where units fire
        layers  i64 [L, s, t], labels of pixels
        whole   labels of the image
        """
        present, there = _labeled(layers, whole)
        fired = masks.flatten(1)
        # Whole numbers below 2^24, as of an image's pixels, are exact in float32.
        counts = fired.float() @ there.float().T  # [U, present]
        categories = [labels.category_of[label] for label in present]
        of_category = counts.new_zeros(len(present), len(labels.categories))
        of_category[range(len(present)), categories] = 1
        seen = counts if presence == "mask" else torch.ones_like(counts)
        self.inter[:, present] += counts.long().cpu()
        self.lab[present] += there.sum(dim=1).cpu()
        self.act.add_((fired.sum(dim=1)[:, None] * (seen @ of_category > 0)).cpu())

    def __add__(self, other: OverlapCounts) -> OverlapCounts:
        return OverlapCounts(self.inter + other.inter, self.lab + other.lab, self.act + other.act)

    def iou(self, labels: Labels) -> Tensor:
        """f64 [U, C]; 0 of no concept."""
        inter = self.inter.double()
        act = self.act.double()[:, list(labels.category_of)]
        iou = inter / (act + self.lab.double() - inter + _EPS)
        iou[:, NO_CONCEPT] = 0
        return iou


def _labeled(layers: Tensor, whole: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """The labels of an image, and where each is: bool [labels, s t]."""
    present = sorted({*torch.unique(layers).tolist(), *whole} - {NO_CONCEPT})
    pixels = layers.flatten(1)
    everywhere = torch.ones(pixels.shape[1], dtype=torch.bool, device=layers.device)
    there = [everywhere if label in whole else (pixels == label).any(dim=0) for label in present]
    return present, torch.stack(there) if there else everywhere[None][:0]
