"""Alignment of the loss gradients with the object, a quantitative form of Han et al. 2023, section 5.

Three quantities of the gradients with respect to the image x in [0, 1], so through the network's normalization:

    mask_energy       sum over the object of |g| / sum of |g|, minus the object's fraction of the view; g = d CE / d x,
                      |.| summed over channels. Chance is 0, the maximum is 1 - area.
    margin_alignment  |<x, grad m(x)>| / ||grad m(x)||, m = highest logit - second highest (Etmann et al. 2019)
    map_cosine        cosine of |g|, averaged over the cells of the teacher's stored map, with that map's positive part

They take two backward passes per record. Shape letters: B batch, K classes, H W the evaluated view, h w the grid of
the stored map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import Batch
from permafrost.core.label_forms import known_mask
from permafrost.core.records import NO_LABEL
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluator import MORE, Evaluator, Page, Quantity
from permafrost.evaluation.forward import attribution_of
from permafrost.loading.geometry import view_images, view_maps
from permafrost.loading.regions import regions_of
from permafrost.models.resolve import require_images
from permafrost_papers.interpretability.options import GradientAlignmentOptions
from permafrost_papers.probe_set import balanced_positions

NAME = "gradient_alignment"


def check_gradient_alignment(context: EvaluationContext) -> None:
    """Raise ConfigError unless the records are images with one label each."""
    require_images(context.store, f"evaluators={NAME}", "leave it out of evaluators")
    require_one_label(context, NAME)


def evaluate_gradient_alignment(context: EvaluationContext) -> dict[str, Any]:
    """Compute the means of the quantities over the records where each is defined.

    These are mask_energy (if records have evaluate.region), margin_alignment and map_cosine (if the first teacher pass
    has maps). The number of such records is <name>_records.

    gradient_alignment-<split>.safetensors is written, unless evaluate.gradient_alignment.pictures is 0, with:

    - rows: i64 [n], rows of the store's index, the same for every network;
    - frames: u8 [n, 3, H, W], the images;
    - labels: i64 [n];
    - gradients: f16 [n, 3, H, W], d CE / d x, each divided by its largest magnitude.
    """
    options = context.options.of(GradientAlignmentOptions)
    order = balanced_positions(context.dataset, NAME)
    takes_all = options.records >= len(context.dataset)
    chosen = None if takes_all else np.sort(order[: options.records]).tolist()
    if options.pictures:
        _write_pictures(context, order[: options.pictures].tolist())
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for batch in context.iter_batches(chosen):
        for name, values in _batch_alignment(context, batch).items():
            sums[name] += float(values.double().nansum())
            counts[name] += int((~values.isnan()).sum())
    defined = [name for name, count in counts.items() if count]
    return {
        **{name: sums[name] / counts[name] for name in defined},
        **{f"{name}_records": counts[name] for name in defined},
    }


def _batch_alignment(context: EvaluationContext, batch: Batch) -> dict[str, Tensor]:
    """Quantities of a batch, [B] each, nan where undefined."""
    model, size = context.model, context.model.input_size
    images = view_images(batch, size)
    score, labels = model.network, batch.labels
    margins = input_gradient(images, lambda pixels: margin(score(pixels).logits))
    values = {"margin_alignment": margin_alignment(images, margins)}
    gradients = _loss_gradients(context, images, labels)
    unknown = ~known_mask(labels)
    if context.has_regions:
        regions = regions_of(
            batch, labels.masked_fill(unknown, NO_LABEL), context.options.region, size
        )
        values["mask_energy"] = mask_energy(gradients, regions).masked_fill(unknown, float("nan"))
    if batch.targets and batch.targets[0].maps is not None:
        stored = batch.targets[0].maps
        grid = (stored.shape[-2], stored.shape[-1])
        maps = attribution_of(view_maps(batch, batch.targets[0], grid), batch)
        values["map_cosine"] = energy_cosine(gradients, maps).masked_fill(unknown, float("nan"))
    return values


def _loss_gradients(context: EvaluationContext, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients of the cross-entropy of labels [B], of class 0 where unknown, with respect to images [B, 3, H, W]."""
    score, targets = context.model.network, labels.clamp(min=0)
    return input_gradient(
        images, lambda pixels: F.cross_entropy(score(pixels).logits, targets, reduction="none")
    )


def _write_pictures(context: EvaluationContext, positions: list[int]) -> None:
    from safetensors.torch import save

    frames, labels, gradients = [], [], []
    for batch in context.iter_batches(positions):
        images = view_images(batch, context.model.input_size)
        loss_gradients = _loss_gradients(context, images, batch.labels)
        largest = loss_gradients.abs().amax(dim=(1, 2, 3), keepdim=True)
        gradients.append(
            (loss_gradients / largest.clamp(min=torch.finfo(loss_gradients.dtype).tiny)).half()
        )
        frames.append((images * 255).round().to(torch.uint8))
        labels.append(batch.labels)
    if positions:
        tensors = {
            "rows": torch.from_numpy(np.asarray(context.dataset.rows_at(np.asarray(positions)))),
            "frames": torch.cat(frames),
            "labels": torch.cat(labels),
            "gradients": torch.cat(gradients),
        }
        context.write(
            f"{NAME}-{context.split}.safetensors",
            save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
        )


# ---- quantities ----------------------------------------------------------------------------------


def input_gradient(images: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute d score_b / d x_b for images [B, C, H, W].

    Args:
        images: [B, C, H, W].
        score: Function from images to scores [B], each of which must not depend on other records.
    """
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(score(x).sum(), x)
    return gradient


def margin(logits: Tensor) -> Tensor:
    """Compute the highest minus the second highest of the logits [B, K]: [B]."""
    highest = logits.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1]


def energy(gradients: Tensor) -> Tensor:
    """Sum |g| over channels: [B, C, H, W] -> f64 [B, H, W]."""
    return gradients.double().abs().sum(dim=1)


def mask_energy(gradients: Tensor, regions: Tensor) -> Tensor:
    """Compute the fraction of |g| on the object minus the object's fraction of the view, f64 [B].

    The result is nan without an object or a gradient.

    Args:
        gradients: [B, C, H, W].
        regions: Bool [B, H, W].
    """
    strength = energy(gradients)
    inside = (strength * regions).sum(dim=(1, 2)) / strength.sum(dim=(1, 2))  # 0 / 0 is nan
    excess = inside - regions.double().mean(dim=(1, 2))
    return excess.masked_fill(~regions.flatten(1).any(dim=1), float("nan"))


def margin_alignment(images: Tensor, gradients: Tensor) -> Tensor:
    """Compute |<x, g>| / ||g||, f64 [B], of images and gradients [B, C, H, W], nan without a gradient."""
    x, g = images.double().flatten(1), gradients.double().flatten(1)
    return (x * g).sum(dim=1).abs() / g.norm(dim=1)  # type: ignore[no-any-return]


def energy_cosine(gradients: Tensor, maps: Tensor) -> Tensor:
    """Compute the cosine of |g|, averaged over the maps' cells, with the positive part of maps, f64 [B].

    The result is nan if either is zero.

    Args:
        gradients: [B, C, H, W].
        maps: [B, h, w].
    """
    grid = (maps.shape[-2], maps.shape[-1])
    pooled = F.adaptive_avg_pool2d(energy(gradients)[:, None], grid).flatten(1)
    positive = maps.double().clamp(min=0).flatten(1)
    lengths = pooled.norm(dim=1) * positive.norm(dim=1)
    return (pooled * positive).sum(dim=1) / lengths  # type: ignore[no-any-return]


EVALUATOR = Evaluator(
    evaluate_gradient_alignment,
    check_gradient_alignment,
    Page(
        "Gradients",
        "Alignment of gradients with the object",
        "Gradients of the loss with respect to the image (Han et al. 2023): their energy on the object minus the "
        "object's fraction of the view (chance is 0), the alignment of the margin's gradient with the image, and the"
        " cosine of the gradient's magnitude with the teacher's stored map.",
        (
            Quantity(
                "mask_energy",
                "Energy on the object, minus its area",
                "Fraction of the energy on the object minus its fraction of the view; a uniform gradient has 0.",
                MORE,
            ),
            Quantity(
                "margin_alignment",
                "Alignment of the image with the margin's gradient",
                "Length of the image's projection on the gradient of the margin between the two highest logits.",
                MORE,
            ),
            Quantity(
                "map_cosine",
                "Cosine with the teacher's map",
                "Cosine of the gradient's magnitude with the teacher's stored map; 1 is the same map.",
                MORE,
            ),
        ),
        pictures="permafrost_papers.interpretability.study_pictures:gradient_figures",
    ),
)
