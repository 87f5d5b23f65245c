"""Shift-equivariance curve of explanations (e2KD, Figure 5).

A window of the frame is moved by T pixels along the diagonal, so its content moves by the same amount. The explanation
of the class predicted without a shift is computed in both windows, and the two maps are compared on their overlap. If
a network's explanation moves with the content, the curve is constantly 1. If a network cuts its input into patches of
16 pixels, or pools with strides, the curve returns to 1 at multiples of these.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.digests import derive_seed
from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import Evaluator
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.evaluation.metrics import upsample
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.transfer import iter_on_device
from permafrost.models.classifier import ModelOutput
from permafrost.models.explanations import contributions_of, explainer_of_maps, forward_to_explain
from permafrost.models.resolve import require_images
from permafrost_evaluators.options import ShiftOptions

_BATCH = 64


@torch.no_grad()
def shift_curves(
    model: EvaluatedModel, dataset: StoreDataset, *, max_shift: int, records: int
) -> dict[str, list[float]]:
    """Compute the mean cosine at each shift of 0 to `max_shift` pixels, by kind of map (e2KD, Figure 5).

    The kind "map" is the explanation itself: GradCAM upsampled to the input, or W of a B-cos network. B-cos networks
    also have the kind "contribution", the sum over channels of W x.

    The windows have the model's input size at the frame's resolution: a frame of 256 has room to move a window of 224
    by 32. If a frame has no room, the area outside is black. Pairs in which either map is zero are left out.

    Args:
        model: Evaluated model.
        dataset: Records of the split.
        max_shift: Largest shift, >= 1 and less than the input's sides.
        records: Maximum number of records, drawn with a fixed seed.
    """
    frames = dataset.in_picture(None)
    drawn = random.Random(derive_seed(0, "shift"))
    chosen = sorted(drawn.sample(range(len(dataset)), min(len(dataset), records)))
    cosines: dict[str, list[Tensor]] = {}
    for batch in iter_on_device(iter_batches(frames, _BATCH, chosen), model.device):
        for kind, curve in _batch_curves(model, batch.inputs, max_shift).items():
            cosines.setdefault(kind, []).append(curve.cpu())
    return {
        kind: torch.cat(parts, dim=1).nanmean(dim=1).tolist() for kind, parts in cosines.items()
    }


class ShiftedPair(NamedTuple):
    """Images and maps of the unmoved and of the moved window."""

    images: Tensor
    """Images f32 [2, B, 3, h, w]: unmoved and moved, like `maps`."""
    maps: Tensor
    """Maps [2, B, h, w] at the input's resolution, or contributions, if the explainer has any."""
    cosine: Tensor
    """Cosine [B] on the overlap of both windows, nan if either map is zero."""


@torch.no_grad()
def shifted_maps(
    model: EvaluatedModel, frames: Tensor, shift: int, explained: Tensor
) -> ShiftedPair:
    """Crop frames to both windows, and explain the given classes in each.

    Args:
        model: Evaluated model.
        frames: u8 [B, 3, H, W].
        shift: Number of pixels by which the content moves down and to the right.
        explained: i64 [B].
    """
    images = [window(frames, model.input_size, moved, shift) for moved in (0, shift)]
    shown = []
    for window_images in images:
        kinds = _maps(
            model,
            forward_to_explain(model.network, window_images),
            explained[:, None],
            window_images,
        )
        shown.append(kinds.get("contribution", kinds["map"]))
    cosine, valid = overlap_cosine(shown[0], shown[1], shift)
    return ShiftedPair(
        torch.stack(images), torch.stack(shown).sum(dim=2), cosine.masked_fill(~valid, float("nan"))
    )


def _batch_curves(model: EvaluatedModel, frames: Tensor, max_shift: int) -> dict[str, Tensor]:
    """Cosines [max_shift + 1, B] by kind of map, nan where a map is zero."""
    images = window(frames, model.input_size, 0, max_shift)
    output = forward_to_explain(model.network, images)
    explained = output.logits.argmax(dim=1, keepdim=True)
    unmoved = _maps(model, output, explained, images)
    curves: dict[str, list[Tensor]] = {kind: [] for kind in unmoved}
    for shift in range(max_shift + 1):
        images = window(frames, model.input_size, shift, max_shift)
        moved = _maps(model, forward_to_explain(model.network, images), explained, images)
        for kind, maps in moved.items():
            cosine, valid = overlap_cosine(unmoved[kind], maps, shift)
            curves[kind].append(cosine.masked_fill(~valid, float("nan")))
    return {kind: torch.stack(curve) for kind, curve in curves.items()}


def window(frames: Tensor, size: tuple[int, int], shift: int, max_shift: int) -> Tensor:
    """Crop frames to a window: f32 [B, 3, h, w] in [0, 1].

    The content of the window moves by `shift` pixels down and to the right. If there is room for `max_shift`, all
    windows are inside the frame, around its center. Otherwise only the unmoved one is.

    Args:
        frames: u8 [B, 3, H, W].
        size: (h, w) of the window.
        shift: Shift of this window, 0 to `max_shift` pixels.
        max_shift: Largest shift of all windows that are compared.
    """
    wide = max(size)  # black on every side, enough for any window
    black = F.pad(frames, (max_shift, wide, max_shift, wide))
    corner = _corner((frames.shape[-2], frames.shape[-1]), size, max_shift)
    top, left = (start + max_shift - shift for start in corner)
    inside = black[..., top : top + size[0], left : left + size[1]]
    return inside.to(torch.float32, memory_format=torch.contiguous_format) / 255


def window_view(frame: tuple[int, int], size: tuple[int, int], max_shift: int) -> Tensor:
    """Compute `canonical_from_view` f32 [3, 3] of the unmoved window in a frame.

    Args:
        frame: (height, width) of the frame.
        size: (height, width) of the window.
        max_shift: Largest shift of all windows that are compared.
    """
    scales, centers = [], []
    for full, side, start in zip(frame, size, _corner(frame, size, max_shift), strict=True):
        scales.append(side / full)
        centers.append((2 * start + side) / full - 1)
    return torch.tensor(
        [[scales[1], 0.0, centers[1]], [0.0, scales[0], centers[0]], [0.0, 0.0, 1.0]]
    )


def _corner(frame: tuple[int, int], size: tuple[int, int], max_shift: int) -> list[int]:
    """Top and left of the unmoved window."""
    rooms = [full - side for full, side in zip(frame, size, strict=True)]
    return [(room + max_shift) // 2 if room >= max_shift else max(room, 0) for room in rooms]


def overlap_cosine(unmoved: Tensor, shifted: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Compute the cosine of two maps on the overlap of both windows.

    Args:
        unmoved: Map of the unmoved window, [B, A, h, w] at the input's resolution.
        shifted: Map of the moved window, [B, A, h, w] at the input's resolution.
        shift: Number of pixels by which the content of the moved window moved down and to the right.

    Returns:
        The cosines f64 [B], and bool [B], True where neither map is zero there.
    """
    height, width = unmoved.shape[-2:]
    there = unmoved[..., : height - shift, : width - shift].flatten(1).double()
    here = shifted[..., shift:, shift:].flatten(1).double()
    scaled = [
        maps / maps.abs().amax(dim=1, keepdim=True).clamp(min=1e-300) for maps in (there, here)
    ]
    return F.cosine_similarity(scaled[0], scaled[1], dim=1), there.any(dim=1) & here.any(dim=1)


def check_shift(option: str, shift: int, size: tuple[int, int]) -> None:
    """Raise ConfigError if the shift moves an input of (height, width) `size` completely out of view."""
    require(
        shift < min(size),
        f"{option}={shift} moves all of the student's input of {size[0]}x{size[1]} pixels out of view; "
        "choose a shift smaller than its sides",
    )


def _maps(
    model: EvaluatedModel, output: ModelOutput, explained: Tensor, images: Tensor
) -> dict[str, Tensor]:
    """Maps [B, A, h, w] by kind, at the input's resolution."""
    maps = model.maps(output, explained)
    shown = {"map": maps[:, 0]}
    if explainer_of_maps(maps).contribution:
        shown["contribution"] = contributions_of(maps, lambda: images)[:, 0]
    return {kind: _at_size(values, model.input_size) for kind, values in shown.items()}


def _at_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return torch.stack([upsample(channel, size) for channel in maps.unbind(dim=1)], dim=1)


# ---- the evaluator -------------------------------------------------------------------------------


def _shift(context: EvaluationContext) -> dict[str, Any]:
    options = context.options.of(ShiftOptions)
    assert options.pixels is not None
    return shift_curves(
        context.model, context.dataset, max_shift=options.pixels, records=options.records
    )


def _check_shift(context: EvaluationContext) -> None:
    if (pixels := context.options.of(ShiftOptions).pixels) is None:
        raise ConfigError(
            "evaluators=shift needs evaluate.shift.pixels; set it, for example evaluate.shift.pixels=32"
        )
    require_images(context.store, f"evaluate.shift.pixels={pixels}", "set it to null")
    check_shift("evaluate.shift.pixels", pixels, context.model.input_size)


EVALUATOR = Evaluator(_shift, _check_shift)
