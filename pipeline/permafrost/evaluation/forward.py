"""The forward pass over a split, and the predictions and metrics that come from it.

Shape letters: n records, K classes, E classes of the record that has most, P classes explained by the teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.explainers import explainer_of_line
from permafrost.core.batches import Batch, Logits, MapTargets, StoredTargets, Targets, TopLogits
from permafrost.core.errors import ConfigError
from permafrost.core.interrupts import check_interrupted
from permafrost.core.label_forms import classes_of, has_many
from permafrost.core.records import NO_CLASS
from permafrost.evaluation.metrics import (
    energy_pointing_game,
    label_scores,
    localization_iou,
    majority_share,
    teacher_scores,
    top_k_accuracy,
    uniform_score,
    upsample,
)
from permafrost.evaluation.per_label import AT_HALF, Thresholds
from permafrost.loading.dataset import (
    StoreDataset,
    covered_rows,
    covering_passes,
    iter_batches,
)
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.loading.geometry import (
    TargetRequest,
    place_on_grid,
    view_images,
    view_maps,
    view_targets,
)
from permafrost.loading.regions import RegionKind, regions_of
from permafrost.loading.subset import HOLDOUT, rows_of_split, select_holdout_rows
from permafrost.loading.transfer import iter_on_device, move_values
from permafrost.losses.map_distances import map_cosine
from permafrost.models.classifier import Classifier, ModelOutput, eval_mode, trial_copy
from permafrost.models.compute import resolve_device
from permafrost.models.explanations import contributions_of, explainer_named, forward_to_explain
from permafrost.models.saved import SavedNetwork, TrainedModel
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store, TeacherPass

logger = logging.getLogger("permafrost.evaluate")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Results of the evaluated records, all tensors on the CPU."""

    keys: tuple[str, ...]
    logits: Tensor
    """Logits [n, K]."""
    thresholds: Thresholds = AT_HALF
    """Thresholds of the evaluated model."""
    labels: Tensor
    groups: Tensor
    epg: Tensor
    """EPG [n, E] of the record's own classes (labels.classes_of), nan where it has no such class or no region."""
    iou: Tensor
    """IoU, in the same form as `epg`."""
    epg_uniform: Tensor
    """EPG of a uniform map (`metrics.uniform_score`), in the same form as `epg`."""
    teacher_logits: Logits | None = None
    """Logits of the first records, which are all of them unless the teacher's pass lacks some."""
    target_class: Tensor | None = None
    """Target classes i64 [n, P], padded with NO_CLASS. This and the fields below are None without stored maps."""
    teacher_epg: Tensor | None = None
    """EPG [n, P] of the stored maps, nan where undefined and without a region. If a record has one label, it is defined
    for the first map, independent of the class that the map explains. If it has many, it is defined for each map that
    explains one of them."""
    map_cosine: Tensor | None = None
    """Cosine [n, P] of the network's maps with the stored maps of the same class, nan where invalid. None if the two
    are by different explainers, or the network's maps have one cell."""


def join(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate the results of all batches."""
    return Predictions(
        keys=tuple(key for part in parts for key in part.keys),
        logits=torch.cat([part.logits for part in parts]),
        thresholds=parts[0].thresholds,
        labels=torch.cat([part.labels for part in parts]),
        groups=torch.cat([part.groups for part in parts]),
        epg=_padded([part.epg for part in parts]),
        iou=_padded([part.iou for part in parts]),
        epg_uniform=_padded([part.epg_uniform for part in parts]),
        teacher_logits=_join_logits([part.teacher_logits for part in parts]),
        target_class=_all(parts, "target_class", NO_CLASS),
        teacher_epg=_all(parts, "teacher_epg"),
        map_cosine=_all(parts, "map_cosine"),
    )


def metrics_of(
    predictions: Predictions,
    group_sets: Mapping[str, Sequence[int]] = MappingProxyType({}),
    top_k: Sequence[int] = (),
) -> dict[str, Any]:
    """Combine `label_metrics`, `localization_metrics` and top-k accuracies with the number of records."""
    metrics = {
        "records": len(predictions.keys),
        **label_metrics(predictions, group_sets),
        **localization_metrics(predictions),
    }
    if top_k:
        metrics["top_k"] = {
            "accuracy": top_k_accuracy(predictions.logits, predictions.labels, top_k)
        }
    return metrics


def label_metrics(
    predictions: Predictions, group_sets: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> dict[str, Any]:
    """Accuracy and agreement with the teacher, as means over the records, fractions in [0, 1].

    majority_accuracy is that of predicting the most frequent label for every record: the chance level of accuracy.

    Args:
        group_sets: As in EvaluateOptions.
    """
    logits, labels, groups = predictions.logits, predictions.labels, predictions.groups
    thresholds = predictions.thresholds
    metrics = label_scores(logits, labels, groups, group_sets, thresholds.model)
    if (majority := majority_share(labels)) is not None:
        metrics["majority_accuracy"] = majority
    if predictions.teacher_logits is not None:
        compared = len(predictions.teacher_logits)
        metrics |= teacher_scores(
            logits[:compared],
            predictions.teacher_logits,
            labels[:compared],
            groups[:compared],
            group_sets,
            thresholds,
        )
        if compared < len(logits):
            metrics["compared_records"] = compared
    return metrics


def localization_metrics(predictions: Predictions) -> dict[str, Any]:
    """EPG, IoU and map cosine, as means over all defined entries, fractions in [0, 1].

    epg_uniform is the EPG (and IoU) of a uniform map on the same regions: the chance level of both. With many labels
    epg_pairs is the number of pairs of a record and one of its classes with a region, over which EPG and IoU are means.
    """
    measured = {
        "epg": predictions.epg,
        "iou": predictions.iou,
        "epg_uniform": predictions.epg_uniform,
        "teacher_epg": predictions.teacher_epg,
    }
    metrics: dict[str, Any] = {
        name: float(values.double().nanmean())
        for name, values in measured.items()
        if values is not None and not values.isnan().all()
    }
    if has_many(predictions.labels) and "epg" in metrics:
        metrics["epg_pairs"] = int((~predictions.epg.isnan()).sum())
    if predictions.map_cosine is not None and predictions.target_class is not None:
        cosines = predictions.map_cosine[predictions.target_class >= 0].double()
        metrics["map_cosine"] = float(cosines.nanmean())
        metrics["valid_map_fraction"] = float((~cosines.isnan()).double().mean())
    return metrics


def _all(parts: Sequence[Predictions], name: str, nothing: float = math.nan) -> Tensor | None:
    """Concatenate a field of all parts, `nothing` where a part has none; None if no part has any."""
    values = [getattr(part, name) for part in parts]
    if (first := next((value for value in values if value is not None), None)) is None:
        return None
    return torch.cat(
        [
            first.new_full((len(part.keys), *first.shape[1:]), nothing) if value is None else value
            for part, value in zip(parts, values, strict=True)
        ]
    )


def _join_logits(parts: Sequence[Logits | None]) -> Logits | None:
    """Concatenate the logits of the records that have any, which come first."""
    first = parts[0]
    if not isinstance(first, TopLogits):
        there = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(there) if there else None
    largest = [part for part in parts if isinstance(part, TopLogits)]
    return replace(
        first,
        values=torch.cat([part.values for part in largest]),
        classes=torch.cat([part.classes for part in largest]),
        rest=torch.cat([part.rest for part in largest]),
    )


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate parts with different numbers of columns into [n, E], padded with nan."""
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, most - part.shape[1]), value=float("nan")) for part in parts])


# ---- forward ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """The model under evaluation: a frozen network, its input size and its explainer."""

    network: Classifier
    input_size: tuple[int, int]
    """(height, width)."""
    thresholds: Thresholds = AT_HALF
    """Logits from which a class is predicted where records have many labels, on the CPU."""
    explainer: str = ""
    """Explainer of its maps; an empty one becomes that of its training, or else the network's own."""

    def __post_init__(self) -> None:
        own = self.network.explainer_of_training or self.network.explainer
        object.__setattr__(self, "explainer", self.explainer or own)

    def is_compared_with(self, teacher: TeacherPass) -> bool:
        """Return whether its maps are compared with those of a pass, by the same explainer or as its training did."""
        return self.explainer in (teacher.explainer, self.network.explainer_of_training)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.network.device

    def maps(self, output: ModelOutput, target_class: Tensor) -> Tensor:
        """Compute the explanations [B, E, A, h, w] of its output for classes [B, E], by its explainer."""
        return explainer_named(self.explainer)(self.network, output, target_class)


@torch.no_grad()
def explained_as(model: EvaluatedModel, passes: Sequence[TeacherPass]) -> EvaluatedModel:
    """Return a model whose maps are by the explainer of the pass that it is compared with.

    A network that this explainer refuses (ConfigError) keeps its own, and its maps are not compared with the pass.

    Args:
        model: Evaluated model.
        passes: Passes that it is compared with, of which the first one counts.
    """
    kind = passes[0].explainer if passes else None
    if kind is None or model.is_compared_with(passes[0]):
        return model
    trial = replace(model, network=trial_copy(model.network), explainer=kind)
    with suppress(ConfigError):
        trial.maps(
            forward_to_explain(
                trial.network,
                torch.zeros(
                    1, *passes[0].store.form.input_shape(model.input_size), device=model.device
                ),
            ),
            torch.zeros(1, 1, dtype=torch.int64, device=model.device),
        )
        return replace(model, explainer=kind)
    return model


def open_split(
    store: Store,
    passes: Sequence[TeacherPass],
    split: str,
    trained: TrainedModel,
    decode_threads: int = 1,
    *,
    with_regions: bool = True,
) -> StoreDataset:
    """Open the records of one of evaluate.splits for the evaluation of a trained model, in its picture.

    Passes that lack targets of that split are left out; `predict_split` compares with the first one where it has some.

    Args:
        store: Store of the split.
        passes: Passes that the model is compared with.
        split: Name of the split.
        trained: Facts of the model's training.
        decode_threads: Number of threads that decode images.
        with_regions: Also read masks and boxes, without which nothing is localized.
    """
    store = store.known_to(trained.classes)
    rows: RowNumbers = (
        select_holdout_rows(store.index, trained.split, trained.subset)
        if split == HOLDOUT
        else rows_of_split(store.index, split)
    )
    return StoreDataset(
        store,
        rows,
        covering_passes(store, rows, passes),
        with_regions=with_regions,
        num_classes=trained.num_classes,
        decode_threads=decode_threads,
    ).in_picture(trained.picture)


def evaluate_split(
    model: EvaluatedModel, dataset: StoreDataset, options: EvaluateOptions, *, localize: bool = True
) -> dict[str, Any]:
    """Evaluate a model on a selection that includes its regions. Metrics are fractions in [0, 1].

    Args:
        localize: False skips maps and regions.
    """
    predictions = predict_records(model, dataset, options, localize=localize)
    return metrics_of(predictions, options.group_sets)


def evaluate_training(
    input_size: tuple[int, int],
    dataset: StoreDataset,
    options: EvaluateOptions,
    model: Classifier,
    *,
    localize: bool = True,
    top_k: Sequence[int] = (),
) -> dict[str, Any]:
    """Compute the metrics of a split for a network in training, and leave the network as it was.

    Args:
        input_size: (height, width) of the network's input.
        dataset: Records of a split.
        options: Options of the evaluation.
        model: The network.
        localize: Whether its explanations are measured, too.
        top_k: Numbers k of top-k accuracies to compute.

    Returns:
        The metrics of the split, as fractions in [0, 1].
    """
    with eval_mode(model):
        subject = explained_as(EvaluatedModel(network=model, input_size=input_size), dataset.passes)
        predictions = predict_records(subject, dataset, options, localize=localize)
    return metrics_of(predictions, options.group_sets, top_k)


def evaluate_model(
    folder: Path, store: Store, options: EvaluateOptions
) -> dict[str, dict[str, Any]]:
    """Run `evaluate_split` for the trained network in a run's folder on each split of `evaluate.splits`."""
    network, trained = SavedNetwork(folder).load(store.manifest.classes)
    device = resolve_device("evaluate.device", options.device)
    model = EvaluatedModel(network=network.to(device), input_size=trained.input_size)
    trained = trained.in_frame(options.frame, store)
    threads = resolve_decode_threads(options.decode_threads)
    return {
        split: evaluate_split(model, open_split(store, (), split, trained, threads), options)
        for split in options.splits
    }


@torch.no_grad()
def predict_records(
    model: EvaluatedModel, dataset: StoreDataset, options: EvaluateOptions, *, localize: bool = True
) -> Predictions:
    """Compute the results per record from which `evaluate_split` derives its metrics.

    Agreement, KL and map cosine compare with the dataset's first teacher pass, if there is one. Maps of another
    explainer than the model's are not compared.

    Args:
        localize: False skips maps and regions.
    """
    return join(
        [
            _predict_batch(
                model,
                batch,
                options,
                localize=localize,
                compares_maps=any(map(model.is_compared_with, dataset.passes[:1])),
            )
            for batch in iter_on_device(iter_batches(dataset, options.batch_size), model.device)
        ]
    )


def predict_split(
    model: EvaluatedModel,
    dataset: StoreDataset,
    options: EvaluateOptions,
    passes: Sequence[TeacherPass],
    *,
    localize: bool = True,
) -> Predictions:
    """Run `predict_records` on a split, compared with a pass on the records that it covers, which then come first.

    Args:
        model: Evaluated model.
        dataset: Records of the split, from `open_split`.
        options: Options of the evaluation.
        passes: Passes that the model is compared with, of which the first one counts.
        localize: False skips maps and regions.
    """
    if dataset.passes or not passes:
        return predict_records(model, dataset, options, localize=localize)
    rows = np.asarray(dataset.rows)
    covered = covered_rows(dataset.store, rows, passes[0])
    logger.info(
        "%s has targets of %d of the %d records of a split, so the model is compared with it on these alone",
        passes[0].name,
        len(covered),
        len(rows),
    )
    parts = []
    for chosen, members in ((covered, passes[:1]), (np.setdiff1d(rows, covered), ())):
        part = StoreDataset(
            dataset.store,
            chosen,
            members,
            with_regions=dataset.with_regions,
            decode_threads=dataset.decode_threads.count,
        )
        part.labels_apply = dataset.labels_apply
        if len(part):
            part = part.in_picture(dataset.picture)
            parts.append(predict_records(model, part, options, localize=localize))
    return join(parts)


def _predict_batch(
    model: EvaluatedModel,
    batch: Batch,
    options: EvaluateOptions,
    *,
    localize: bool,
    compares_maps: bool,
) -> Predictions:
    check_interrupted()
    output = forward_to_explain(model.network, view_images(batch, model.input_size))
    size = model.input_size
    scores: list[tuple[Tensor, ...]] = []
    for classes in classes_of(batch.labels).T:
        nowhere = output.logits.new_full((len(classes),), float("nan"))
        scores.append((nowhere, nowhere, nowhere))
        if not (localize and batch.has_places):
            continue
        regions = regions_of(batch, classes, options.region, size)
        if (no_region := ~regions.flatten(1).any(dim=1)).all():  # no map is needed
            continue
        maps = attribution_of(maps_of(model, output, classes), batch)
        upsampled = upsample(maps, (regions.shape[-2], regions.shape[-1]))
        measured = (
            energy_pointing_game(upsampled, regions),
            localization_iou(upsampled, regions, options.iou_threshold),
            uniform_score(regions),
        )
        scores[-1] = tuple(each.masked_fill(no_region, float("nan")) for each in measured)
    epg, iou, epg_uniform = (torch.stack(values, dim=1) for values in zip(*scores, strict=True))
    cosine = teacher_logits = explained = teacher_epg = None
    if batch.targets:
        if batch.targets[0].maps is not None and localize:
            teacher_epg = _teacher_epg(batch, batch.targets[0], options.region, size).cpu()
            explained = batch.targets[0].target_class
        reads_images = explainer_of_line(model.explainer).reads == "images"
        grid = size if reads_images else (output.features.shape[-2], output.features.shape[-1])
        targets = view_targets(batch, TargetRequest(grid, with_maps=localize))[0]
        if targets.logits is not None:
            teacher_logits = move_values(targets.logits, torch.device("cpu"))
        cosine = _cosine_to_teacher(model, output, targets) if compares_maps else None
    return Predictions(
        keys=batch.keys,
        logits=output.logits.detach().float().cpu(),
        thresholds=model.thresholds,
        labels=batch.labels.cpu(),
        groups=batch.groups.cpu(),
        epg=epg.cpu(),
        iou=iou.cpu(),
        epg_uniform=epg_uniform.cpu(),
        teacher_logits=teacher_logits,
        target_class=None if explained is None else explained.cpu(),
        teacher_epg=teacher_epg,
        map_cosine=cosine,
    )


def _teacher_epg(
    batch: Batch, stored: StoredTargets, kind: RegionKind, size: tuple[int, int]
) -> Tensor:
    """EPG of the stored maps as defined for `Predictions.teacher_epg`: [n, P]."""
    explained, _ = stored.require_maps()
    of_region = batch.labels[:, None]
    if has_many(batch.labels):
        is_of_record = batch.labels.gather(1, explained.clamp(min=0)) > 0
        of_region = explained.where(is_of_record, NO_CLASS)
    placed = [regions_of(batch, classes, kind, size) for classes in of_region.T]
    scores = torch.full(explained.shape, float("nan"), device=explained.device)
    if not any(regions.any() for regions in placed):  # no map is needed
        return scores
    maps = view_maps(batch, stored, size)
    for place, regions in enumerate(placed):
        epg = energy_pointing_game(attribution_of(maps[:, place : place + 1], batch), regions)
        nowhere = ~regions.flatten(1).any(dim=1) | (explained[:, place] < 0)
        scores[:, place] = epg.masked_fill(nowhere, float("nan"))
    return scores


def maps_of(model: EvaluatedModel, output: ModelOutput, classes: Tensor) -> Tensor:
    """Compute the maps of given classes.

    Args:
        model: The network.
        output: Its output for n images.
        classes: i64 [n]; a negative one stands for the predicted class.

    Returns:
        f32 [n, 1, A, h, w], on the network's own grid.
    """
    top1 = output.logits.argmax(dim=1)
    return model.maps(output, torch.where(classes >= 0, classes, top1)[:, None])


def attribution_of(maps: Tensor, batch: Batch) -> Tensor:
    """Compute the signed attribution [B, h, w] of the first class of maps [B, E, A, h, w]."""
    return contributions_of(maps, images_at(maps, batch))[:, 0, 0]


def images_at(maps: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """Return the function that renders a batch on the grid of maps [..., h, w], f32 [B, 3, h, w] in [0, 1]."""
    return partial(view_images, batch, (maps.shape[-2], maps.shape[-1]))


def _cosine_to_teacher(model: EvaluatedModel, output: Any, targets: Targets) -> Tensor | None:
    """Cosine [n, P] of the model's maps with the stored ones of its explainer, nan where invalid, None without any."""
    if not isinstance(targets, MapTargets) or (
        (maps := model.maps(output, targets.target_class)).shape[-2:] == (1, 1)
    ):
        return None  # as maps of one cell are all equal
    cosine, nonzero = map_cosine(
        place_on_grid(maps, (targets.maps.shape[-2], targets.maps.shape[-1])),
        targets.maps,
        model.input_size,
    )
    return torch.where(nonzero & targets.map_valid, cosine, float("nan")).cpu()
