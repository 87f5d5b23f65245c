"""One pass of a frozen model over a split: all its numbers, and a few of its maps to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.dataset import iter_in_order
from pipeline.evaluation.agreement import label_scores, teacher_scores
from pipeline.evaluation.localization import (
    energy_pointing_game,
    localization_iou,
    upsample,
)
from pipeline.explainers import EXPLAINERS, forward_to_explain
from pipeline.explainers.bcos_weights import color_picture, contribution_map, is_bcos_weights
from pipeline.geometry import judged_view, view_images, view_maps, view_targets
from pipeline.labels import classes_of, decide, has_many
from pipeline.losses.map_cosine import map_cosine
from pipeline.models.bcos.layers import add_inverse
from pipeline.records import NO_CLASS
from pipeline.regions import regions_of
from pipeline.stream import move_batch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config import EvaluateOptions
    from pipeline.dataset import StoreDataset
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import ModelOutput
    from pipeline.records import Batch, StoredTargets, Targets
    from pipeline.regions import RegionKind


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
    """One batch of n records, judged; every tensor on the CPU."""

    logits: Tensor
    """[n, K]."""
    labels: Tensor
    groups: Tensor
    epg: Tensor
    """Of every place for a label, a record's one or (padded) many; nan where it has no label or no region."""
    iou: Tensor
    teacher_logits: Tensor | None
    teacher_epg: Tensor
    """Of the stored maps; of one label a record the first, whatever class it explains, of many each that
    explains one of them. nan where there is no map or no region."""
    map_cosine: Tensor | None
    """With the teacher's stored maps, for each class that the teacher explains; nan where invalid."""


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
        **label_scores(logits, labels, groups, options.group_sets),
    }
    for name in ("epg", "iou", "teacher_epg"):
        values = _all(judged, name).double()
        if not values.isnan().all():
            metrics[name] = float(values.nanmean())
    if judged[0].teacher_logits is not None:
        teacher_logits = _all(judged, "teacher_logits")
        metrics |= teacher_scores(logits, teacher_logits, labels, groups, options.group_sets)
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

    Of many labels the class is the first that the teacher explains, or the lowest where it explains none.
    Of a B-cos network maps are its contributions, and colors its weights as RGBA, u8 [n, h, w, 4].
    """
    batch = move_batch(dataset.__getitems__(positions), subject.device)
    batch = judged_view(batch, frame, subject.input_size)
    images = view_images(batch, subject.input_size)
    output = forward_to_explain(subject.model, images)
    many = has_many(batch.labels)
    pictures = {
        "frames": (images * 255).round().to(torch.uint8),
        "labels": batch.labels,
        "predictions": decide(output.logits, many=many),
        **_pictured(_maps_of(subject, output, _pictured_classes(batch)), batch),
    }
    if batch.targets and (stored := batch.targets[0].maps) is not None:
        grid = (stored.shape[-2], stored.shape[-1])
        explained = _pictured(view_maps(batch, batch.targets[0], grid), batch)
        pictures |= {f"teacher_{name}": tensor for name, tensor in explained.items()}
        pictures["teacher_predictions"] = decide(batch.targets[0].logits, many=many)
    return {name: tensor.cpu().contiguous() for name, tensor in pictures.items()}


def _pictured(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    shown = {"maps": _evidence(maps, batch)}
    if is_bcos_weights(maps):
        colors = color_picture(maps, _encoded(batch, maps))[:, 0]
        shown["colors"] = (colors * 255).round().to(torch.uint8)
    return shown


def _pictured_classes(batch: Batch) -> Tensor:
    """[n]; negative where nothing is known."""
    own = classes_of(batch.labels)[:, 0]
    explained = batch.targets[0].explained_class if batch.targets else None
    if explained is None or not has_many(batch.labels):
        return own
    return torch.where(explained[:, 0] >= 0, explained[:, 0], own)


def _judge_batch(subject: Subject, batch: Batch, options: EvaluateOptions) -> Judged:
    output = forward_to_explain(subject.model, view_images(batch, subject.input_size))
    size = subject.input_size
    if batch.canonical_from_view is None:
        size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
    scores = []
    for classes in classes_of(batch.labels).T:
        regions = regions_of(batch, classes, options.region, size)
        no_region = ~regions.flatten(1).any(dim=1)
        if no_region.all():  # no map is needed
            nowhere = output.logits.new_full((len(classes),), float("nan"))
            scores.append((nowhere, nowhere))
            continue
        maps = _evidence(_maps_of(subject, output, classes), batch)
        scores.append(_localise(maps, regions, no_region, options))
    epg, iou = (torch.cat(values) for values in zip(*scores, strict=True))
    teacher_epg = torch.full((len(batch.keys),), float("nan"))
    cosine = teacher_logits = None
    if batch.targets:
        if batch.targets[0].maps is not None:
            teacher_epg = _teacher_epg(batch, batch.targets[0], options.region, size)
        grid = (output.features.shape[-2], output.features.shape[-1])
        targets = view_targets(batch, grid)[0]
        teacher_logits = targets.logits.cpu()
        cosine = _cosine_to_teacher(subject, output, targets)
    return Judged(
        logits=output.logits.detach().float().cpu(),
        labels=batch.labels.cpu(),
        groups=batch.groups.cpu(),
        epg=epg.cpu(),
        iou=iou.cpu(),
        teacher_logits=teacher_logits,
        teacher_epg=teacher_epg.cpu(),
        map_cosine=cosine,
    )


def _localise(
    maps: Tensor, regions: Tensor, no_region: Tensor, options: EvaluateOptions
) -> tuple[Tensor, Tensor]:
    """EPG and IoU of maps [n, h, w] and regions bool [n, H, W]: each [n], nan where there is no region."""
    upsampled = upsample(maps, (regions.shape[-2], regions.shape[-1]))
    epg = energy_pointing_game(upsampled, regions)
    iou = localization_iou(upsampled, regions, options.iou_threshold)
    return epg.masked_fill(no_region, float("nan")), iou.masked_fill(no_region, float("nan"))


def _teacher_epg(
    batch: Batch, stored: StoredTargets, kind: RegionKind, size: tuple[int, int]
) -> Tensor:
    """EPG of the stored maps, as of `Judged.teacher_epg`: a value a record and map."""
    assert stored.explained_class is not None
    explained = stored.explained_class
    of_region = batch.labels[:, None]
    if has_many(batch.labels):
        own = batch.labels.gather(1, explained.clamp(min=0)) > 0
        of_region = explained.where(own, NO_CLASS)
    placed = [regions_of(batch, classes, kind, size) for classes in of_region.T]
    if not any(regions.any() for regions in placed):  # no map is needed
        return torch.full((len(batch.keys) * len(placed),), float("nan"))
    maps = view_maps(batch, stored, size)
    scores = []
    for place, regions in enumerate(placed):
        epg = energy_pointing_game(_evidence(maps[:, place : place + 1], batch), regions)
        nowhere = ~regions.flatten(1).any(dim=1) | (explained[:, place] < 0)
        scores.append(epg.masked_fill(nowhere, float("nan")))
    return torch.cat(scores)


def _maps_of(subject: Subject, output: ModelOutput, classes: Tensor) -> Tensor:
    """Maps [n, 1, A, h, w] of the given classes [n], of the model's own top-1 where there is none."""
    top1 = output.logits.argmax(dim=1)
    return subject.maps(output, torch.where(classes >= 0, classes, top1)[:, None])


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


def _cosine_to_teacher(subject: Subject, output: Any, targets: Targets) -> Tensor | None:
    """A value for each class that the teacher explains, nan where invalid; None where nothing is comparable."""
    if targets.maps is None or targets.explained_class is None or targets.map_valid is None:
        return None
    maps = subject.maps(output, targets.explained_class)
    if maps.shape[2] != targets.maps.shape[2]:
        return None  # a GradCAM and a B-cos network's weights are not comparable
    cosine, nonzero = map_cosine(maps, targets.maps, subject.input_size)
    valid = nonzero & targets.map_valid
    explained = targets.explained_class >= 0
    return torch.where(valid, cosine, float("nan"))[explained].cpu()


def _all(judged: list[Judged], name: str) -> Tensor:
    return torch.cat([getattr(batch, name) for batch in judged])
