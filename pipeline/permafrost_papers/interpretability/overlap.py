"""Overlap of units and concepts: thresholds of units, and counts of intersections.

    T_k = the smallest activation of unit k with P(a_k > T_k) <= quantile

over all images and positions. It is the (m + 1)-th largest of the N activations, with m = floor(quantile N). The m + 1
largest activations seen so far are therefore kept, and those of two parts merge into the largest of both.

    IoU[k, c] = inter[k, c] / (act[k, cat(c)] + lab[c] - inter[k, c] + 1e-10)

    inter[k, c]    pixels with label c where unit k is active
    lab[c]         pixels with label c; an image-level label counts for all pixels of its image
    act[k, cat]    pixels where unit k is active, over the images in which one of these pixels has a label of the
                   category (mask), or in which any pixel has one (image), as in the paper's text

A pixel with the same label in several label images counts once. The blog of Han et al. defines an IoU per image and
interpolates the thresholded map. Their code does neither, and this module follows the code.

Shape letters: B images, U units, h w grid, n activations kept, C labels, G categories, L label images, s t their height
and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost_papers.interpretability.concepts import NO_CONCEPT, Labels

_ROUNDING = 1e-9
"""Tolerance on quantile N, against rounding errors just below a whole number."""


def kept_of(quantile: float, activations: int) -> int:
    """Return the number m + 1 of activations per unit that must be kept to determine its threshold.

    Args:
        quantile: Fraction of the activations that are above the threshold.
        activations: Number N of activations of a unit, over all images and positions.
    """
    return math.floor(quantile * activations + _ROUNDING) + 1


def keep_largest(largest: Tensor, activations: Tensor, keep: int) -> Tensor:
    """Merge the largest activations of each unit so far with those of further images.

    Args:
        largest: [U, n], n <= keep.
        activations: [B, U, h, w].
        keep: Number of activations per unit.

    Returns:
        The `keep` largest in descending order, or all if there are fewer. The last column has the thresholds.
    """
    both = torch.cat([largest, activations.transpose(0, 1).flatten(1)], dim=1)
    return both.topk(min(keep, both.shape[1]), dim=1).values


def keep_top_images(
    values: Tensor, numbers: Tensor, activations: Tensor, further: Tensor, keep: int
) -> tuple[Tensor, Tensor]:
    """Merge the images with the highest maximal activation of each unit so far with further images.

    Args:
        values: Maximal activations [U, n] in descending order.
        numbers: Numbers of their images, i64 [U, n].
        activations: [B, U, h, w].
        further: Numbers of the further images, i64 [B].
        keep: Number of images per unit.

    Returns:
        Values and numbers of the `keep` highest. Of equal values, the earlier images are first.
    """
    highest = activations.amax(dim=(2, 3)).T
    numbers = torch.cat([numbers, further.expand_as(highest)], dim=1)
    values, order = torch.cat([values, highest], dim=1).sort(dim=1, descending=True, stable=True)
    return values[:, :keep], numbers.gather(1, order[:, :keep])


# ---- overlap counts --------------------------------------------------------------------------------


_EPS = 1e-10

Presence = Literal["mask", "image"]


def firing_mask(activations: Tensor, thresholds: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute masks of active units, bool [U, s, t].

    Activations are upsampled bilinearly, and a unit is active where they are strictly above its threshold. A unit that
    is 0 almost everywhere has the threshold 0, and is not active where it is 0.

    Args:
        activations: [U, h, w] of one image.
        thresholds: [U].
        size: (height, width) of the masks.
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
        """Return the counts of an empty set."""
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
        image_labels: tuple[int, ...],
        labels: Labels,
        presence: Presence = "mask",
    ) -> None:
        """Add one image, in place.

        Args:
            masks: Bool [U, s, t], masks of active units.
            layers: i64 [L, s, t], labels of pixels.
            image_labels: Labels of the whole image.
            labels: Concepts of the set.
            presence: When an image counts for a category: "mask" if the unit is active on a pixel with one of its
                labels, "image" if any pixel has one.
        """
        present, there = _labeled(layers, image_labels)
        fired = masks.flatten(1)
        # The counts within one image are below 2^24, so they are exact in float32.
        counts = fired.float() @ there.float().T  # [U, present]
        of_category = counts.new_zeros(len(present), len(labels.categories))
        of_category[range(len(present)), [labels.category_of[label] for label in present]] = 1
        label_presence = counts if presence == "mask" else torch.ones_like(counts)
        self.inter[:, present] += counts.long().cpu()
        self.lab[present] += there.sum(dim=1).cpu()
        self.act.add_((fired.sum(dim=1)[:, None] * (label_presence @ of_category > 0)).cpu())

    def iou(self, labels: Labels) -> Tensor:
        """Compute the IoU f64 [U, C], 0 for the label of no concept."""
        inter = self.inter.double()
        act = self.act.double()[:, list(labels.category_of)]
        iou = inter / (act + self.lab.double() - inter + _EPS)
        iou[:, NO_CONCEPT] = 0
        return iou


def _labeled(layers: Tensor, image_labels: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Labels of an image and the mask of each: bool [labels, s t]."""
    present = sorted({*torch.unique(layers).tolist(), *image_labels} - {NO_CONCEPT})
    pixels = layers.flatten(1)
    everywhere = torch.ones(pixels.shape[1], dtype=torch.bool, device=layers.device)
    there = [
        everywhere if label in image_labels else (pixels == label).any(dim=0) for label in present
    ]
    return present, torch.stack(there) if there else everywhere[None][:0]
