"""Five-band scores: does an explanation mark the part that makes the class, the rest of the object, and no more?

(Tjoa and Guan; Han et al. 2023.) A map divided by its highest absolute value falls into five bands,

    -2: x <= -0.7,   -1: (-0.7, -0.3],   0: (-0.3, 0.3],   1: (0.3, 0.7],   2: x > 0.7

and is compared with the truth: 2 on the part that makes the class, 1 on the rest of the object, 0 elsewhere. Of every
pixel TP: both the same band, not 0; FP: marked, and wrongly; TN: both 0; FN: not marked where it should be. The soft
score moves the thresholds toward 0 and keeps the best step, and the mean over steps.

A map of zeros is already right on the whole background, so accuracy never stands without recall, precision and FPR. A
GradCAM, after its ReLU, has no band below 0. Shape letters: B batch, H W the evaluated view, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError, require
from pipeline.core.records import NO_CLASS, Batch
from pipeline.evaluation.context import EvaluationContext
from pipeline.evaluation.evaluators.evaluator import Evaluator, Page, Quantity
from pipeline.evaluation.forward import attribution_of, maps_of
from pipeline.evaluation.localization import upsample
from pipeline.evaluation.metrics import LESS_PER_CENT, PER_CENT
from pipeline.loading.geometry import canonical_from_view, view_images, warp
from pipeline.models.explainers.explain import forward_to_explain
from pipeline.models.resolve import require_images

NAME = "five_band"
_LOW, _HIGH = 0.3, 0.7
_DECIMALS = 9
_THRESHOLDS = {"legacy": (11, 0.02), "v2": (56, 0.005)}
"""Steps, and by how much each moves both thresholds."""
_SCORES = ("accuracy", "recall", "precision", "fpr")
_PART = 2
"""Of a mask: what makes the class."""
_CHECKED = 64
"""Masks that are looked at before anything is computed."""


# ---- scores --------------------------------------------------------------------------------------


def steps_of(thresholds: str) -> list[float]:
    """How far each step of a schedule moves the thresholds toward 0; the first is the hard score."""
    count, width = _THRESHOLDS[thresholds]
    return [width * step for step in range(count)]


def normalize(maps: Tensor) -> Tensor:
    """Maps [B, H, W] divided by their highest absolute value, f64; a map of zeros stays."""
    wide = maps.double()
    highest = wide.abs().amax(dim=(1, 2), keepdim=True)
    return wide / torch.where(highest > 0, highest, 1.0)


def bands_of(maps: Tensor, moved: float = 0.0) -> Tensor:
    """i64 in -2 to 2 of normalized maps, with thresholds moved toward 0; a threshold belongs to the band below."""
    # Rounded, as 0.3 - 0.2 is less than 0.1 in floats, and a pixel of 0.1 belongs to the band below.
    low, high = round(_LOW - moved, _DECIMALS), round(_HIGH - moved, _DECIMALS)
    thresholds = torch.tensor([-high, -low, low, high], dtype=maps.dtype, device=maps.device)
    return torch.bucketize(maps, thresholds) - 2


@dataclass(frozen=True)
class BandCounts:
    """Pixels of each kind at each step; counts of parts of a split add up exactly."""

    counts: Tensor
    """i64 [S, 4]: TP, FP, TN, FN."""
    background: int = 0
    """Pixels of which the truth is 0."""
    records: int = 0
    silent: int = 0
    """Records whose map is all zero."""

    @classmethod
    def of(cls, maps: Tensor, truth: Tensor, steps: Sequence[float]) -> BandCounts:
        """Of maps [B, H, W] of any positive scale and bands i64 [B, H, W] of the truth."""
        scaled = normalize(maps)
        counts = []
        for moved in steps:
            bands = bands_of(scaled, moved)
            marked, object_ = bands != 0, truth != 0
            right = bands == truth
            kinds = (marked & right, marked & ~right, ~marked & ~object_, ~marked & object_)
            counts.append(torch.stack([kind.sum() for kind in kinds]))
        silent = int((~scaled.flatten(1).any(dim=1)).sum())
        return cls(torch.stack(counts).cpu(), int((truth == 0).sum()), len(maps), silent)

    def __add__(self, other: BandCounts) -> BandCounts:
        return BandCounts(
            self.counts + other.counts,
            self.background + other.background,
            self.records + other.records,
            self.silent + other.silent,
        )

    @property
    def scores(self) -> dict[str, Tensor]:
        """f64 [S] each, over all pixels; 0 where there is nothing to divide by."""
        tp, fp, tn, fn = self.counts.double().T
        shares = ((tp + tn, fp + fn), (tp, fn), (tp, fp), (fp, tn))
        return {
            name: part / (part + rest).clamp(min=1)
            for name, (part, rest) in zip(_SCORES, shares, strict=True)
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """Each score by hard, best (the step of the highest accuracy) and mean, and what they are to be read with."""
        scores = self.scores
        best = int(scores["accuracy"].argmax())
        return {
            **{
                name: {
                    "hard": float(values[0]),
                    "best": float(values[best]),
                    "mean": float(values.mean()),
                }
                for name, values in scores.items()
            },
            "best_step": best,
            "background_fraction": self.background / int(self.counts[0].sum()),
            "zero_map_fraction": self.silent / self.records,
        }


# ---- the evaluator -----------------------------------------------------------------------------------


def check_five_band(context: EvaluationContext) -> Mapping[str, str]:
    """ConfigError unless the split has masks of two levels."""
    require_images(context.store, f"evaluators={NAME}", "leave it out of evaluators")
    if not bool((context.dataset.columns["mask_size"] > 0).any()):
        raise ConfigError(
            f"evaluators={NAME} needs masks of two levels (1 the object, 2 the part that makes its class), and "
            f"{context.split} has none; evaluate students of a store of data=cells"
        )
    first = context.dataset.__getitems__(list(range(min(_CHECKED, len(context.dataset)))))
    _require_levels(context, first)
    return {}


def _require_levels(context: EvaluationContext, batch: Batch) -> None:
    assert batch.masks is not None
    highest = int(batch.masks.max())
    require(
        highest <= _PART,
        f"evaluators={NAME} needs masks of two levels (1 the object, 2 the part that makes its class), and {context.split} "
        f"has one with {highest}; evaluate students of a store of data=cells",
    )


def evaluate_five_band(context: EvaluationContext) -> dict[str, Any]:
    """accuracy, recall, precision and fpr over all pixels, each by hard, best and mean (over the soft score's steps),
    of the subject's own explanation of the class that it predicts; background_fraction is the accuracy of a map of
    zeros, zero_map_fraction how many of its maps are that.
    """
    steps = steps_of(context.options.five_band.thresholds)
    total = BandCounts(torch.zeros(len(steps), 4, dtype=torch.int64))
    for batch in context.iter_batches():
        _require_levels(context, batch)
        truth = truth_bands(batch, context.model.input_size)
        total = total + BandCounts.of(_explanations(context, batch), truth, steps)
    return total.metrics


@torch.no_grad()
def _explanations(context: EvaluationContext, batch: Batch) -> Tensor:
    """[B, H, W], of the predicted classes; signed where the explainer is."""
    model = context.model
    output = forward_to_explain(model.network, view_images(batch, model.input_size))
    predicted = torch.full_like(output.logits[:, 0], NO_CLASS, dtype=torch.int64)
    return upsample(attribution_of(maps_of(model, output, predicted), batch), model.input_size)


def truth_bands(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Masks of two levels as bands in the batch's view: i64 [B, H, W] at (height, width) `size`."""
    assert batch.masks is not None
    levels = [batch.masks >= level for level in (1, _PART)]
    if batch.canonical_from_view is not None or size != tuple(batch.masks.shape[-2:]):
        levels = [warp(level.float(), canonical_from_view(batch), size) > 0.5 for level in levels]
    return levels[0][:, 0].long() + levels[1][:, 0].long()


EVALUATOR = Evaluator(
    evaluate_five_band,
    check_five_band,
    Page(
        "Five bands",
        "Does it mark the part that makes the class?",
        "Explanations in five bands against the truth (Tjoa and Guan): hard thresholds, the best of softer ones, "
        "and the mean over them. A map of zeros has the background's share as its accuracy, so read recall and "
        "FPR beside it.",
        (
            Quantity("accuracy", "Accuracy of pixels", PER_CENT, "bar"),
            Quantity("recall", "Recall", PER_CENT, "bar"),
            Quantity("precision", "Precision", PER_CENT, is_main=False),
            Quantity("fpr", "False positive rate", LESS_PER_CENT, "bar"),
        ),
    ),
)
