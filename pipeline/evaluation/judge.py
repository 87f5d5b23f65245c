"""One pass of a frozen model over a split: all its numbers, and a few of its maps to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.dataset import iter_in_order
from pipeline.evaluation.agreement import accuracy, agreement, group_accuracies, kl_to_teacher
from pipeline.evaluation.localization import (
    box_regions,
    energy_pointing_game,
    localization_iou,
    upsample,
)
from pipeline.explainers import EXPLAINERS, forward_to_explain
from pipeline.explainers.bcos_weights import color_picture, contribution_map, is_bcos_weights
from pipeline.geometry import judged_view, view_images, view_maps, view_targets, warp
from pipeline.losses.map_cosine import map_cosine
from pipeline.models.bcos.layers import add_inverse
from pipeline.stream import move_batch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import EvaluateOptions
    from pipeline.dataset import StoreDataset
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import ModelOutput
    from pipeline.records import Batch, Targets


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Who is judged: a frozen model, and how its reasons are read."""

    model: Classifier
    input_size: tuple[int, int]
    """(height, width)."""

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def maps(self, output: ModelOutput, explained_class: Tensor) -> Tensor:
        """Explanations [B, E, A, h, w] of its output by the network's own explainer, for classes [B, E]."""
        return EXPLAINERS[self.model.explainer](self.model, output, explained_class)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One batch, judged; every tensor on the CPU."""

    logits: Tensor
    """[n, K]."""
    maps: Tensor
    """[n, h, w]: the label's class, the model's own top-1 where there is no label."""
    labels: Tensor
    groups: Tensor
    epg: Tensor
    """[n]; nan where a record has no region."""
    iou: Tensor
    teacher_logits: Tensor | None
    teacher_epg: Tensor
    """[n]: of the stored map, whatever class it explains; nan where there is no map or no region."""
    map_cosine: Tensor | None
    """[n]: with the teacher's stored map, for the class that the teacher explains; nan where invalid."""


@torch.no_grad()
def judge_split(
    subject: Subject, dataset: StoreDataset, options: EvaluateOptions
) -> dict[str, Any]:
    """Metrics of a model on a selection that includes its regions; fractions in [0, 1].

    The dataset's first teacher pass, if any, is what agreement, KL and map cosine compare with.
    """
    judged = [
        _judge_batch(
            subject,
            judged_view(move_batch(batch, subject.device), options.frame, subject.input_size),
            options,
        )
        for batch in iter_in_order(dataset, options.batch_size)
    ]
    logits, labels, groups = (_all(judged, name) for name in ("logits", "labels", "groups"))
    metrics: dict[str, Any] = {
        "records": len(labels),
        "accuracy": accuracy(logits, labels),
        "group_accuracy": group_accuracies(logits, labels, groups),
    }
    labelled = [value for value in metrics["group_accuracy"].values() if not math.isnan(value)]
    if labelled:
        metrics["worst_group_accuracy"] = min(labelled)
    for name in ("epg", "iou", "teacher_epg"):
        values = _all(judged, name).double()
        if not values.isnan().all():
            metrics[name] = float(values.nanmean())
    if judged[0].teacher_logits is not None:
        teacher_logits = _all(judged, "teacher_logits")
        metrics["agreement"] = agreement(logits, teacher_logits)
        metrics["kl_to_teacher"] = kl_to_teacher(logits, teacher_logits)
        metrics["teacher_accuracy"] = accuracy(teacher_logits, labels)
    if judged[0].map_cosine is not None:
        cosines = _all(judged, "map_cosine").double()
        metrics["map_cosine"] = float(cosines.nanmean())
        metrics["valid_map_fraction"] = float((~cosines.isnan()).double().mean())
    return metrics


@torch.no_grad()
def picture_maps(
    subject: Subject, dataset: StoreDataset, positions: list[int], frame: str = "auto"
) -> dict[str, Tensor]:
    """Images as judged, the model's maps of the label's class and the teacher's maps, for a few records.

    Of a B-cos network maps are its contributions, and colors its weights as RGBA, u8 [n, h, w, 4].
    """
    batch = move_batch(dataset.__getitems__(positions), subject.device)
    batch = judged_view(batch, frame, subject.input_size)
    images = view_images(batch, subject.input_size)
    output = forward_to_explain(subject.model, images)
    pictures = {
        "frames": (images * 255).round().to(torch.uint8),
        "labels": batch.labels,
        "predictions": output.logits.argmax(dim=1),
        **_pictured(_label_maps(subject, output, batch), batch),
    }
    if batch.targets and (stored := batch.targets[0].maps) is not None:
        grid = (stored.shape[-2], stored.shape[-1])
        explained = _pictured(view_maps(batch, batch.targets[0], grid), batch)
        pictures |= {f"teacher_{name}": tensor for name, tensor in explained.items()}
        pictures["teacher_predictions"] = batch.targets[0].logits.argmax(dim=1)
    return {name: tensor.cpu().contiguous() for name, tensor in pictures.items()}


def _pictured(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    shown = {"maps": _evidence(maps, batch)}
    if is_bcos_weights(maps):
        colors = color_picture(maps, _encoded(batch, maps))[:, 0]
        shown["colors"] = (colors * 255).round().to(torch.uint8)
    return shown


def _judge_batch(subject: Subject, batch: Batch, options: EvaluateOptions) -> Judged:
    output = forward_to_explain(subject.model, view_images(batch, subject.input_size))
    maps = _evidence(_label_maps(subject, output, batch), batch)
    regions = _regions(batch, options.region)
    size = (regions.shape[-2], regions.shape[-1])
    if batch.canonical_from_view is not None:
        size = subject.input_size
        regions = warp(regions[:, None].float(), batch.canonical_from_view, size)[:, 0] > 0.5
    no_region = ~regions.flatten(1).any(dim=1)
    nowhere = maps.new_full((len(maps),), float("nan"))
    epg, iou, teacher_epg = nowhere, nowhere, nowhere
    if not no_region.all():
        upsampled = upsample(maps, size)
        epg = energy_pointing_game(upsampled, regions).masked_fill(no_region, float("nan"))
        iou = localization_iou(upsampled, regions, options.iou_threshold)
        iou = iou.masked_fill(no_region, float("nan"))
    cosine = teacher_logits = None
    if batch.targets:
        if batch.targets[0].maps is not None:
            stored = _evidence(view_maps(batch, batch.targets[0], size), batch)
            stored_epg = energy_pointing_game(stored, regions)
            teacher_epg = stored_epg.masked_fill(no_region, float("nan"))
        grid = (output.features.shape[-2], output.features.shape[-1])
        targets = view_targets(batch, grid)[0]
        teacher_logits = targets.logits.cpu()
        cosine = _cosine_to_teacher(subject, output, targets)
    return Judged(
        logits=output.logits.detach().float().cpu(),
        maps=maps.cpu(),
        labels=batch.labels.cpu(),
        groups=batch.groups.cpu(),
        epg=epg.cpu(),
        iou=iou.cpu(),
        teacher_logits=teacher_logits,
        teacher_epg=teacher_epg.cpu(),
        map_cosine=cosine,
    )


def _label_maps(subject: Subject, output: Any, batch: Batch) -> Tensor:
    top1 = output.logits.argmax(dim=1)
    explained = torch.where(batch.labels >= 0, batch.labels, top1)[:, None]
    return subject.maps(output, explained)


def _evidence(maps: Tensor, batch: Batch) -> Tensor:
    """Where the first class's maps [B, E, A, h, w] see it, [B, h, w].

    The six channels of a B-cos network's weights say so together with what they weigh.
    """
    if is_bcos_weights(maps):
        maps = contribution_map(maps, _encoded(batch, maps))
    return maps[:, 0].sum(dim=1)


def _encoded(batch: Batch, maps: Tensor) -> Tensor:
    """What a B-cos network sees of the batch, on its map's grid: [B, 6, h, w]."""
    return add_inverse(view_images(batch, (maps.shape[-2], maps.shape[-1])))


def _regions(batch: Batch, kind: str) -> Tensor:
    """Where the object is in each canonical frame, bool [B, H, W]; nowhere where there is no region."""
    size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
    if kind == "masks":
        assert batch.masks is not None
        return batch.masks[:, 0] > 0
    boxes = [record_boxes.cpu() for record_boxes in batch.boxes]
    return box_regions(boxes, batch.labels.cpu(), size).to(batch.inputs.device)


def _cosine_to_teacher(subject: Subject, output: Any, targets: Targets) -> Tensor | None:
    """[n], nan where invalid; None where there is nothing to compare with."""
    if targets.maps is None or targets.explained_class is None or targets.map_valid is None:
        return None
    maps = subject.maps(output, targets.explained_class)
    if maps.shape[2] != targets.maps.shape[2]:
        return None  # a GradCAM and a B-cos network's weights are not comparable
    cosine, nonzero = map_cosine(maps, targets.maps, subject.input_size)
    valid = nonzero & targets.map_valid
    return torch.where(valid, cosine, float("nan"))[:, 0].cpu()


def _all(judged: list[Judged], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in judged])
