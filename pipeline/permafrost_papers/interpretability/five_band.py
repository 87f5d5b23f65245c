"""Five-band scores of explanations against masks of two levels (Tjoa and Guan; Han et al. 2023).

A map is divided by its highest absolute value and split into five bands,

    -2: x <= -0.7,   -1: (-0.7, -0.3],   0: (-0.3, 0.3],   1: (0.3, 0.7],   2: x > 0.7

and compared with the ground truth: 2 on the part that determines the class, 1 on the rest of the object, 0 elsewhere.
Each pixel is one of

    TP  both in the same band, which is not 0
    FP  marked, and in the wrong band
    TN  both 0
    FN  not marked, but in the object

The soft score moves the thresholds toward 0 in steps, and reports the best step and the mean over steps.

A map of zeros is correct on the whole background, so accuracy is always reported with recall, precision and FPR. A
GradCAM map, after its ReLU, has no band below 0. Shape letters: B batch, H W the evaluated view, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permafrost.core.batches import Batch
from permafrost.core.errors import require
from permafrost.core.records import NO_CLASS
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import (
    LESS_PER_CENT,
    PER_CENT,
    Evaluator,
    Metric,
    Page,
    Quantity,
)
from permafrost.evaluation.forward import attribution_of, maps_of
from permafrost.evaluation.metrics import upsample
from permafrost.loading.geometry import canonical_from_view, view_images, warp
from permafrost.models.explanations import forward_to_explain
from permafrost.models.resolve import require_images
from permafrost_papers.interpretability.options import FiveBandOptions

NAME = "five_band"
_LOW, _HIGH = 0.3, 0.7
_DECIMALS = 9
_THRESHOLDS = {"legacy": (11, 0.02), "v2": (56, 0.005)}
"""Schedule -> number of steps, and the amount by which each step moves both thresholds."""
_SCORES = ("accuracy", "recall", "precision", "fpr")
_PART = 2
"""Level of a mask on the part that determines the class."""
_CHECKED = 64
"""Number of masks that are checked before anything is computed."""


# ---- scores --------------------------------------------------------------------------------------


def steps_of(thresholds: str) -> list[float]:
    """Return the offsets by which the steps of a schedule move the thresholds toward 0.

    The first is 0, the hard score.

    Args:
        thresholds: Name of the schedule, "legacy" or "v2".
    """
    count, width = _THRESHOLDS[thresholds]
    return [width * step for step in range(count)]


def normalize(maps: Tensor) -> Tensor:
    """Divide maps [B, H, W] by their highest absolute value, in f64. A map of zeros is unchanged."""
    wide = maps.double()
    highest = wide.abs().amax(dim=(1, 2), keepdim=True)
    return wide / torch.where(highest > 0, highest, 1.0)


def bands_of(maps: Tensor, offset: float = 0.0) -> Tensor:
    """Compute the bands of normalized maps, i64 from -2 to 2, with the thresholds moved toward 0.

    A value equal to a threshold belongs to the band below it.

    Args:
        maps: Maps of `normalize`, in [-1, 1].
        offset: Amount by which all thresholds are moved.
    """
    # Rounding is needed because 0.3 - 0.2 < 0.1 in floats, and a pixel of 0.1 belongs to the band below.
    low, high = round(_LOW - offset, _DECIMALS), round(_HIGH - offset, _DECIMALS)
    thresholds = torch.tensor([-high, -low, low, high], dtype=maps.dtype, device=maps.device)
    return torch.bucketize(maps, thresholds) - 2


@dataclass(frozen=True)
class BandCounts:
    """Pixel counts of each kind at each step, which can be added over the parts of a split."""

    counts: Tensor
    """Numbers of pixels i64 [S, 4]: TP, FP, TN, FN."""
    background: int = 0
    """Number of pixels whose ground truth is 0."""
    records: int = 0
    silent: int = 0
    """Number of records whose map is all zero."""

    @classmethod
    def of(cls, maps: Tensor, truth: Tensor, steps: Sequence[float]) -> BandCounts:
        """Count maps against the ground truth.

        Args:
            maps: [B, H, W], of any positive scale.
            truth: Bands of the ground truth, i64 [B, H, W].
            steps: Offsets of the thresholds.
        """
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
        """Scores over all pixels, f64 [S] each, 0 if the denominator is 0."""
        tp, fp, tn, fn = self.counts.double().T
        shares = ((tp + tn, fp + fn), (tp, fn), (tp, fp), (fp, tn))
        return {
            name: part / (part + rest).clamp(min=1)
            for name, (part, rest) in zip(_SCORES, shares, strict=True)
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """Hard, best (at the step of highest accuracy) and mean value of each score, with the context to read them."""
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


def check_five_band(context: EvaluationContext) -> None:
    """Raise ConfigError unless the split has masks of two levels."""
    require_images(context.store, f"evaluators={NAME}", "leave it out of evaluators")
    require(
        context.dataset.has_masks,
        f"evaluators={NAME} needs masks of two levels (1 the object, 2 the part that determines its class), but "
        f"{context.split} has no masks; evaluate students of a store of data=cells",
    )
    first = context.dataset.__getitems__(list(range(min(_CHECKED, len(context.dataset)))))
    _require_levels(context, first)


def _require_levels(context: EvaluationContext, batch: Batch) -> None:
    assert batch.masks is not None
    highest = int(batch.masks.max())
    require(
        highest <= _PART,
        f"evaluators={NAME} needs masks of two levels (1 the object, 2 the part that determines its class), but "
        f"{context.split} has one with {highest}; evaluate students of a store of data=cells",
    )


def evaluate_five_band(context: EvaluationContext) -> dict[str, Any]:
    """Evaluate the model's explanation of its predicted class.

    The metrics are:

    - accuracy, recall, precision and fpr: over all pixels, each as hard, best and mean (over the steps of the soft
      score);
    - best_step: number of the step with the highest accuracy;
    - background_fraction: accuracy of a map of zeros;
    - zero_map_fraction: fraction of maps that are all zero.

    Raises:
        ConfigError: If a mask has more than two levels.
    """
    steps = steps_of(context.options.of(FiveBandOptions).thresholds)
    total = BandCounts(torch.zeros(len(steps), 4, dtype=torch.int64))
    for batch in context.iter_batches():
        _require_levels(context, batch)
        truth = truth_bands(batch, context.model.input_size)
        total = total + BandCounts.of(_explanations(context, batch), truth, steps)
    return total.metrics


@torch.no_grad()
def _explanations(context: EvaluationContext, batch: Batch) -> Tensor:
    """Maps [B, H, W] of the predicted classes, signed if the explainer is."""
    model = context.model
    output = forward_to_explain(model.network, view_images(batch, model.input_size))
    predicted = torch.full_like(output.logits[:, 0], NO_CLASS, dtype=torch.int64)
    return upsample(attribution_of(maps_of(model, output, predicted), batch), model.input_size)


def truth_bands(batch: Batch, size: tuple[int, int]) -> Tensor:
    """Convert masks of two levels to bands in the batch's view: i64 [B, H, W] at (height, width) `size`."""
    assert batch.masks is not None
    levels = [batch.masks >= level for level in (1, _PART)]
    if batch.canonical_from_view is not None or size != tuple(batch.masks.shape[-2:]):
        levels = [
            warp(level.float(), canonical_from_view(batch), size, moves=batch.moves) > 0.5
            for level in levels
        ]
    return levels[0][:, 0].long() + levels[1][:, 0].long()


EVALUATOR = Evaluator(
    evaluate_five_band,
    check_five_band,
    Page(
        "Five bands",
        "Explanations against masks of the decisive part",
        "Explanations in five bands compared with the ground truth (Tjoa and Guan): at the hard thresholds, at the "
        "best of the softer ones, and the mean over all of them. The accuracy of a map of zeros is the fraction of the "
        "background, so read it together with recall and FPR.",
        (
            Quantity(
                "accuracy",
                "Pixel accuracy",
                "Fraction of pixels that are right; a map of zeros reaches the fraction of the background.",
                PER_CENT,
                "bar",
            ),
            Quantity(
                "background_fraction",
                "Pixel accuracy of a map of zeros",
                "Fraction of the background, which is the level of the pixel accuracy.",
                Metric(higher_is_better=None),
            ),
            Quantity(
                "recall",
                "Recall",
                "Object pixels in their own band, as a fraction of these and of unmarked object pixels; a map of zeros "
                "has 0.",
                PER_CENT,
                "bar",
            ),
            Quantity(
                "precision",
                "Precision",
                "Fraction of the marked pixels, in the object or outside, that are in their own band.",
                PER_CENT,
                is_main=False,
            ),
            Quantity(
                "fpr",
                "False positive rate",
                "Pixels in a wrong band, of the background or of the object, as a fraction of these and of the "
                "unmarked background; a map of zeros has 0.",
                LESS_PER_CENT,
                "bar",
            ),
        ),
    ),
)
