"""Network dissection: units of a layer that detect a human-interpretable concept (Bau et al. 2017; Han et al. 2023).

It makes two passes over a concept set, which is independent of the store: the first finds each unit's threshold, the
second counts pixels. Units are the channels of one stage. Shape letters: B images, U units, C labels, h w the stage's
grid, H W the input of the evaluated model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import COUNT, MORE, Evaluator, Page, Quantity
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.models.classifier import Normalize
from permafrost.models.resolve import require_images
from permafrost.storage.files import file_at
from permafrost_papers.interpretability.concepts import (
    BrodenFolder,
    ConceptImage,
    ConceptSet,
    DrawnConcepts,
    Labels,
)
from permafrost_papers.interpretability.options import DissectionOptions
from permafrost_papers.interpretability.overlap import (
    OverlapCounts,
    firing_mask,
    keep_largest,
    keep_top_images,
    kept_of,
)
from permafrost_papers.probe_set import activations

NAME = "dissection"
_DRAWN, _SIDE = 400, 64
_LEGACY_MEAN, _LEGACY_STD = (124.69 / 255, 118.69 / 255, 109.54 / 255), 0.224
"""Normalization of the published code, with channels in RGB order."""


@dataclass(frozen=True)
class DissectionResult:
    """Results of both passes."""

    labels: Labels
    iou: Tensor
    """IoU f64 [U, C] of each unit with each label."""
    thresholds: Tensor
    """Thresholds f32 [U]."""
    top_images: Tensor
    """Numbers of the images with the highest activation of each unit, i64 [U, n]."""
    images: int


# ---- the evaluator -----------------------------------------------------------------------------------


def check_dissection(context: EvaluationContext) -> Mapping[str, str]:
    """Check that the concept set and the stage exist.

    Returns:
        SHA-256 of the set's tables, by their path.

    Raises:
        ConfigError: If one of them does not exist.
    """
    options = context.options.of(DissectionOptions)
    require_images(context.store, f"evaluators={NAME}", "leave it out of evaluators")
    concepts = open_concepts(options)
    units_of(context.model, _blank(context.model, options), options.stage)
    tables = concepts.tables if isinstance(concepts, BrodenFolder) else []
    return {str(path): file_at(path).sha256() for path in tables}


def evaluate_dissection(context: EvaluationContext) -> dict[str, Any]:
    """Dissect the evaluated model. The results are the same for all splits, because none is read.

    The numbers are:

    - units and images: number of units, and of images of the concept set;
    - detectors: number of units whose IoU with a concept is at least evaluate.dissection.iou;
    - unique_concepts: number of different concepts among the detectors;
    - mean_iou: mean IoU of each unit with its best concept;
    - detectors_by_category and concepts_by_category: detectors and unique concepts by category;
    - top_units: the best units with their concepts.

    dissection-<split>.safetensors is written with:

    - thresholds: f32 [U];
    - unit_iou: f32 [U];
    - unit_concept: i64 [U], a label number of the concept set;
    - shown_units: i64 [n], the top units in their order;
    - shown_frames: u8 [n, m, 3, H, W], the images that activate them most;
    - shown_masks: u8 [n, m, H, W], 1 where the unit is active in that image.
    """
    options = context.options.of(DissectionOptions)
    dissection = _dissect_once(context.model, options, context.options.batch_size)
    best, concept = dissection.iou.max(dim=1)
    order = best.argsort(descending=True, stable=True)[: options.top_units].tolist()
    _write_pictures(context, dissection, order)
    labels = dissection.labels
    category = [labels.categories[labels.category_of[label]] for label in concept.tolist()]
    detects = (best >= options.iou).tolist()
    detectors = list(compress(zip(category, concept.tolist(), strict=True), detects))
    by_category = {
        name: [label for kind, label in detectors if kind == name] for name in labels.categories
    }
    return {
        "units": len(best),
        "images": dissection.images,
        "detectors": sum(detects),
        "unique_concepts": sum(len(set(names)) for names in by_category.values()),
        "mean_iou": float(best.mean()),
        "detectors_by_category": {name: len(units) for name, units in by_category.items()},
        "concepts_by_category": {name: len(set(units)) for name, units in by_category.items()},
        "top_units": [
            {
                "unit": unit,
                "concept": labels.names[int(concept[unit])],
                "category": category[unit],
                "iou": float(best[unit]),
            }
            for unit in order
        ],
    }


@lru_cache(maxsize=1)
def _dissect_once(
    model: EvaluatedModel, options: DissectionOptions, batch_size: int
) -> DissectionResult:
    """Run `dissect` once for all splits of an evaluation."""
    return dissect(model, open_concepts(options), options, batch_size)


def open_concepts(options: DissectionOptions) -> ConceptSet:
    """Open the concept set of evaluate.dissection.path, or the synthetic one.

    Raises:
        ConfigError: If the folder is not that of a concept set.
    """
    if options.path is None:
        return DrawnConcepts(options.images or _DRAWN, _SIDE)
    return BrodenFolder(Path(options.path), options.images)


# ---- two passes ----------------------------------------------------------------------------------


@torch.no_grad()
def dissect(
    model: EvaluatedModel, concepts: ConceptSet, options: DissectionOptions, batch_size: int
) -> DissectionResult:
    """Compute the IoU of every unit with every concept.

    Args:
        model: Evaluated model.
        concepts: Concept set, which is read twice.
        options: Options of the evaluator.
        batch_size: Number of pictures of a forward pass.

    Raises:
        ConfigError: If the network does not have the stage.
    """
    blank = units_of(model, _blank(model, options), options.stage)
    _, units, h, w = blank.shape
    keep = kept_of(options.quantile, len(concepts) * h * w)
    largest = blank.new_zeros(units, 0)
    top = largest, torch.zeros(units, 0, dtype=torch.int64, device=model.device)
    for numbers, _, activation_batch in _passes(
        model, concepts, options, batch_size, with_labels=False
    ):
        largest = keep_largest(largest, activation_batch, keep)
        further = torch.tensor(numbers, device=model.device)
        top = keep_top_images(*top, activation_batch, further, options.top_images)
    counts = OverlapCounts.zeros(units, concepts.labels)
    for _, pictures, activation_batch in _passes(model, concepts, options, batch_size):
        for picture, activation in zip(pictures, activation_batch, strict=True):
            layers = torch.from_numpy(picture.layers).long().to(model.device)
            masks = firing_mask(activation, largest[:, -1], (layers.shape[1], layers.shape[2]))
            counts.count(masks, layers, picture.whole, concepts.labels, options.cat_presence)
    return DissectionResult(
        concepts.labels,
        counts.iou(concepts.labels),
        largest[:, -1].float().cpu(),
        top[1].cpu(),
        len(concepts),
    )


def _passes(
    model: EvaluatedModel,
    concepts: ConceptSet,
    options: DissectionOptions,
    batch_size: int,
    *,
    with_labels: bool = True,
) -> Iterator[tuple[list[int], list[ConceptImage], Tensor]]:
    """Iterate over batches of image numbers, images and their activations [B, U, h, w]."""
    for start in range(0, len(concepts), batch_size):
        numbers = list(range(start, min(start + batch_size, len(concepts))))
        pictures = [concepts.read(number, with_labels=with_labels) for number in numbers]
        images = _legacy_normalization(model, model_inputs(model, pictures), options)
        yield numbers, pictures, units_of(model, images, options.stage)


@torch.no_grad()
def units_of(model: EvaluatedModel, images: Tensor, stage: int | None) -> Tensor:
    """Compute the channels [B, U, h, w] of a stage.

    Args:
        model: Evaluated model.
        images: f32 [B, 3, H, W] in [0, 1].
        stage: Number of the stage, counted from 1, None for the deepest.

    Raises:
        ConfigError: If the network has no such layer with a spatial grid.
    """
    layers = activations(model.network, images)
    names = [name for name, values in layers.items() if values.dim() == 4]
    name = f"layer{stage}" if stage is not None else (names[-1] if names else "")
    if name not in names:
        known = (
            f"it has stages 1 to {len(names)}" if "layer1" in names else "its stages are not known"
        )
        way = "set it to one of them, or to null" if names else f"leave {NAME} out of evaluators"
        raise ConfigError(
            f"evaluate.{NAME}.stage={stage}: {type(model.network.network).__name__} has no such layer with a spatial "
            f"grid; {known}; {way}"
        )
    return layers[name]


def model_inputs(model: EvaluatedModel, pictures: Sequence[ConceptImage]) -> Tensor:
    """Resize whole pictures to the model's input size: f32 [B, 3, H, W] in [0, 1]."""
    resized = []
    for picture in pictures:
        image = picture.image[None].to(model.device).float() / 255
        if image.shape[-2:] != model.input_size:
            image = F.interpolate(
                image, model.input_size, mode="bilinear", align_corners=False, antialias=True
            )
        resized.append(image)
    return torch.cat(resized)


def _blank(model: EvaluatedModel, options: DissectionOptions) -> Tensor:
    return _legacy_normalization(
        model, torch.zeros(1, 3, *model.input_size, device=model.device), options
    )


def _legacy_normalization(
    model: EvaluatedModel, images: Tensor, options: DissectionOptions
) -> Tensor:
    """Transform images so that the network's own normalization matches the published code (legacy_norm)."""
    if not options.legacy_norm:
        return images
    normalizations = [module for module in model.network.modules() if isinstance(module, Normalize)]
    require(
        bool(normalizations),
        f"evaluate.{NAME}.legacy_norm=true replaces a network's normalization, but "
        f"{type(model.network.network).__name__} has none; set it to false",
    )
    mean = images.new_tensor(_LEGACY_MEAN).view(-1, 1, 1)
    return (images - mean) / _LEGACY_STD * normalizations[0].std + normalizations[0].mean


def _write_pictures(
    context: EvaluationContext, dissection: DissectionResult, units: Sequence[int]
) -> None:
    from safetensors.torch import save

    options, model = context.options.of(DissectionOptions), context.model
    concepts = open_concepts(options)
    best, concept = dissection.iou.max(dim=1)
    frames, masks = [], []
    for unit in units:
        numbers = dissection.top_images[unit].tolist()
        images = model_inputs(
            model, [concepts.read(number, with_labels=False) for number in numbers]
        )
        unit_activations = units_of(
            model, _legacy_normalization(model, images, options), options.stage
        )[:, unit : unit + 1]
        threshold = dissection.thresholds[unit : unit + 1].to(model.device)
        masks.append(
            torch.cat([firing_mask(one, threshold, model.input_size) for one in unit_activations])
        )
        frames.append((images * 255).round().to(torch.uint8))
    tensors = {
        "thresholds": dissection.thresholds,
        "unit_iou": best.float(),
        "unit_concept": concept,
        "shown_units": torch.tensor(units, dtype=torch.int64),
    }
    if units:
        tensors["shown_frames"] = torch.stack(frames)
        tensors["shown_masks"] = torch.stack(masks).to(torch.uint8)
    context.write(
        f"{NAME}-{context.split}.safetensors",
        save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}),
    )


EVALUATOR = Evaluator(
    evaluate_dissection,
    check_dissection,
    Page(
        "Concepts",
        "Concepts detected by single units",
        "Network dissection (Bau et al. 2017): a unit detects a concept if its highest activations, over all "
        "images, overlap the concept's pixels with IoU >= 0.05.",
        (
            Quantity(
                "detectors",
                "Units that detect a concept",
                "Number of units whose strongest activations overlap some concept with IoU of at least 0.05.",
                COUNT,
            ),
            Quantity(
                "unique_concepts",
                "Unique concepts among them",
                "Number of different concepts that these units detect.",
                COUNT,
            ),
            Quantity(
                "detectors_by_category",
                "Detectors by category",
                "Number of detecting units by the category of their best concept.",
                COUNT,
                "bar",
            ),
            Quantity(
                "mean_iou",
                "Mean IoU of each unit with its best concept",
                "Overlap of each unit with its best concept, averaged over all units; 1 is a perfect detector.",
                MORE,
                is_main=False,
            ),
        ),
        per_split=False,
        pictures="permafrost_papers.interpretability.study_pictures:dissection_figures",
    ),
)
