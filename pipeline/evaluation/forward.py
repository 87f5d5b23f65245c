"""One pass of a frozen model over a split: all its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.judging import EvaluateOptions
from pipeline.core.labels import classes_of, has_many
from pipeline.core.records import NO_CLASS, Batch, StoredTargets, Targets
from pipeline.evaluation.localization import (
    energy_pointing_game,
    localization_iou,
    upsample,
)
from pipeline.evaluation.predictions import Judged, join, metrics_of
from pipeline.loading.dataset import StoreDataset, iter_in_order
from pipeline.loading.geometry import judged_view, view_images, view_maps, view_targets
from pipeline.loading.loader import move_batch
from pipeline.loading.regions import RegionKind, regions_of
from pipeline.loading.selection import HOLDOUT, rows_of_split, select_holdout_rows
from pipeline.losses.map_cosine import map_cosine
from pipeline.models.bcos.layers import add_inverse
from pipeline.models.classifier import Classifier
from pipeline.models.devices import resolve_device
from pipeline.models.explainers.bcos_weights import contribution_map, is_bcos_weights
from pipeline.models.explainers.explain import EXPLAINERS, forward_to_explain
from pipeline.models.output import ModelOutput
from pipeline.models.saved import TrainedModel, load_model
from pipeline.store.reader import Store, TeacherPass


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


def open_split(
    store: Store, passes: Sequence[TeacherPass], split: str, trained: TrainedModel
) -> StoreDataset:
    """The records of one of evaluate.splits, as a student is judged on them."""
    if split == HOLDOUT:
        rows = select_holdout_rows(store.index, trained.split, trained.subset)
    else:
        rows = rows_of_split(store.index, split)
    return StoreDataset(store, rows, passes, with_regions=True, num_classes=trained.num_classes)


def judge_split(
    subject: Subject, dataset: StoreDataset, options: EvaluateOptions
) -> dict[str, Any]:
    """Metrics of a model on a selection that includes its regions; fractions in [0, 1]."""
    return metrics_of(judge_records(subject, dataset, options), options.group_sets)


def judge_model(folder: Path, store: Store, options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """`judge_split` of the trained network in a run's folder, by split of `evaluate.splits`."""
    model, trained = load_model(folder)
    device = resolve_device("evaluate.device", options.device)
    subject = Subject(model=model.to(device), input_size=trained.input_size)
    return {
        split: judge_split(
            subject,
            StoreDataset(store, rows_of_split(store.index, split), with_regions=True),
            options,
        )
        for split in options.splits
    }


@torch.no_grad()
def judge_records(
    subject: Subject, dataset: StoreDataset, options: EvaluateOptions, *, localise: bool = True
) -> Judged:
    """What those metrics are made of.

    The dataset's first teacher pass, if any, is what agreement, KL and map cosine compare with.

    localise  False leaves maps and regions alone
    """
    return join(
        [
            _judge_batch(
                subject,
                judged_view(move_batch(batch, subject.device), options.frame, subject.input_size),
                options,
                localise=localise,
            )
            for batch in iter_in_order(dataset, options.batch_size)
        ]
    )


def _judge_batch(
    subject: Subject, batch: Batch, options: EvaluateOptions, *, localise: bool
) -> Judged:
    output = forward_to_explain(subject.model, view_images(batch, subject.input_size))
    size = subject.input_size
    scores = []
    for classes in classes_of(batch.labels).T:
        nowhere = output.logits.new_full((len(classes),), float("nan"))
        scores.append((nowhere, nowhere))
        if not localise or batch.is_table:
            continue
        regions = regions_of(batch, classes, options.region, size)
        no_region = ~regions.flatten(1).any(dim=1)
        if no_region.all():  # no map is needed
            continue
        maps = evidence(maps_of(subject, output, classes), batch)
        scores[-1] = _localise(maps, regions, no_region, options)
    epg, iou = (torch.stack(values, dim=1) for values in zip(*scores, strict=True))
    cosine = teacher_logits = explained = teacher_epg = None
    if batch.targets:
        if batch.targets[0].maps is not None and localise:
            teacher_epg = _teacher_epg(batch, batch.targets[0], options.region, size).cpu()
            explained = batch.targets[0].explained_class
        grid = (output.features.shape[-2], output.features.shape[-1])
        targets = view_targets(batch, grid, with_maps=localise)[0]
        teacher_logits = targets.logits.cpu()
        cosine = _cosine_to_teacher(subject, output, targets)
    return Judged(
        keys=batch.keys,
        logits=output.logits.detach().float().cpu(),
        labels=batch.labels.cpu(),
        groups=batch.groups.cpu(),
        epg=epg.cpu(),
        iou=iou.cpu(),
        teacher_logits=teacher_logits,
        explained_class=None if explained is None else explained.cpu(),
        teacher_epg=teacher_epg,
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
    """EPG of the stored maps, as of `Judged.teacher_epg`: [n, P]."""
    assert stored.explained_class is not None
    explained = stored.explained_class
    of_region = batch.labels[:, None]
    if has_many(batch.labels):
        own = batch.labels.gather(1, explained.clamp(min=0)) > 0
        of_region = explained.where(own, NO_CLASS)
    placed = [regions_of(batch, classes, kind, size) for classes in of_region.T]
    scores = torch.full(explained.shape, float("nan"), device=explained.device)
    if not any(regions.any() for regions in placed):  # no map is needed
        return scores
    maps = view_maps(batch, stored, size)
    for place, regions in enumerate(placed):
        epg = energy_pointing_game(evidence(maps[:, place : place + 1], batch), regions)
        nowhere = ~regions.flatten(1).any(dim=1) | (explained[:, place] < 0)
        scores[:, place] = epg.masked_fill(nowhere, float("nan"))
    return scores


def maps_of(subject: Subject, output: ModelOutput, classes: Tensor) -> Tensor:
    """Maps [n, 1, A, h, w] of the given classes [n], of the model's own top-1 where there is none."""
    top1 = output.logits.argmax(dim=1)
    return subject.maps(output, torch.where(classes >= 0, classes, top1)[:, None])


def evidence(maps: Tensor, batch: Batch) -> Tensor:
    """Where the first class's maps [B, E, A, h, w] see it, [B, h, w].

    The six channels of a B-cos network's weights say so together with what they weigh.
    """
    if is_bcos_weights(maps):
        maps = contribution_map(maps, encoded(batch, maps))
    return maps[:, 0].sum(dim=1)


def encoded(batch: Batch, maps: Tensor) -> Tensor:
    """What a B-cos network sees of the batch, on its map's grid: [B, 6, h, w]."""
    return add_inverse(view_images(batch, (maps.shape[-2], maps.shape[-1])))


def _cosine_to_teacher(subject: Subject, output: Any, targets: Targets) -> Tensor | None:
    """[n, P], nan where invalid; None where nothing is comparable."""
    if targets.maps is None or targets.explained_class is None or targets.map_valid is None:
        return None
    maps = subject.maps(output, targets.explained_class)
    if maps.shape[2] != targets.maps.shape[2]:
        return None  # a GradCAM and a B-cos network's weights are not comparable
    cosine, nonzero = map_cosine(maps, targets.maps, subject.input_size)
    valid = nonzero & targets.map_valid
    return torch.where(valid, cosine, float("nan")).cpu()
