"""Evaluator `equivariance`: stored targets of a transformed view compared with the teacher's output on that view.

Frozen mode keeps a record's logits and applies the view's transform to its map. Both are approximations. Their
quality depends on the teacher and on the augmentation, and this module measures it for one kind of operation at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.lost_variance import LostVariance, add_lost_variance
from permafrost.config.augment import AnyOperation, AugmentOptions
from permafrost.config.evaluation import EquivarianceOptions
from permafrost.core.batches import Batch, top_class
from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import Evaluator, Metric, Page, Quantity
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.geometry import TargetRequest, view_images, view_maps, view_targets
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.transfer import copy_to
from permafrost.losses.logit_distances import outcome_log_probs
from permafrost.losses.map_distances import map_cosine
from permafrost.models.classifier import Intermediates
from permafrost.models.explanations import Explainer, explainer_named, forward_to_explain
from permafrost.models.resolve import require_images

UNMOVED = "none"
"""Name of the measurement on the whole frame. For a teacher of whole frames it shows the error of the store's rounding
alone."""


def check_equivariance(context: EvaluationContext) -> Mapping[str, str]:
    """Raise ConfigError unless the model is a teacher of images whose pass contains its maps."""
    model, passes = context.config.model, context.dataset.passes
    require(
        model == "teacher",
        "evaluators=equivariance compares a teacher with its own stored targets; set model=teacher instead of "
        f"model={model}",
    )
    require_images(context.store, "evaluators=equivariance", "remove it from evaluators")
    lacking = f"{passes[0].name} has none" if passes else f"{context.store.path} has no pass of it"
    require(
        context.has_maps or _has_features(context),
        f"evaluators=equivariance needs the teacher's maps or features, but {lacking}; run permafrost precompute with "
        "this teacher and annotate.payloads=[logits,map], or name its pass with store.teacher=",
    )
    return {}


@torch.no_grad()
def evaluate_equivariance(context: EvaluationContext) -> dict[str, dict[str, float]]:
    """Measure each kind of operation of `augment`, always applied, on records of the split drawn with a fixed seed.

    As in a training, the views are of the whole frame. The metrics, each a mapping from kinds of operations to numbers,
    are:

    - map_cosine: mean cosine between the warped stored map and the recomputed map of the stored class, at the teacher's
      input size, without pairs in which either is zero;
    - logits_kl: mean KL(recomputed || stored) of the softmax at temperature 1, in nats;
    - top1_agreement: fraction of records whose stored and recomputed logits have the same top-1 class;
    - features_lost: fraction of the variance of the recomputed features that the warped stored ones miss (1 - R^2),
      over the covered cells of all records, mean over the stages of the pass.

    Returns:
        The metrics by name, without those that the pass has no fields for.
    """
    dataset, model = context.dataset, context.model
    alone: dict[str, tuple[AnyOperation, ...]] = {UNMOVED: ()}
    for operation in context.config.augment.operations:
        alone[operation.kind] = (replace(operation, p=1.0),)
    one_aspect = dataset.has_frame_aspect
    schedules = {
        kind: ViewSchedule(
            AugmentOptions(operations=drawn), context.store.size, seed=0, one_aspect=one_aspect
        )
        for kind, drawn in alone.items()
    }
    explainer = dataset.passes[0].explainer
    explain = None if explainer is None else explainer_named(explainer)
    order = np.random.default_rng(0).permutation(len(dataset))
    positions = np.sort(order[: context.options.of(EquivarianceOptions).records])
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in alone}
    errors: dict[str, dict[str, LostVariance]] = {kind: {} for kind in alone}
    if _has_features(context):
        rows = dataset.rows_at(np.arange(len(dataset)))
        context = replace(context, dataset=context.open_rows(rows, dataset.passes, FEATURES))
    start = 0
    for batch in context.iter_batches(positions.tolist()):
        aspects = batch.aspects.cpu()
        for kind, schedule in schedules.items():
            views = schedule.views(0, start, aspects)
            drawn = None if views is None else copy_to(views, model.device)
            view_batch = replace(batch, canonical_from_view=drawn)
            parts[kind].append(_compare(model, explain, view_batch))
            if _has_features(context):
                images = view_images(view_batch, model.input_size)
                (targets, *_) = view_targets(view_batch, TargetRequest((1, 1), with_maps=False))
                output = model.network(images, Intermediates(stages=True))
                add_lost_variance(errors[kind], targets, output, dataset.passes[0].projections)
        start += len(batch.keys)
    metrics: dict[str, dict[str, float]] = {q.name: {} for q in _PAGE.quantities}
    for kind, compared in parts.items():
        cosine, kl, agrees = (torch.cat(v).double() for v in zip(*compared, strict=True))
        if explain is not None:
            metrics["map_cosine"][kind] = float(cosine.nanmean())
        if errors[kind]:
            lost = [variance.share() for variance in errors[kind].values()]
            metrics["features_lost"][kind] = sum(lost) / len(lost)
        if not kl.isnan().all():
            metrics["logits_kl"][kind] = float(kl.mean())
            metrics["top1_agreement"][kind] = float(agrees.mean())
    return {name: by_kind for name, by_kind in metrics.items() if by_kind}


def _has_features(context: EvaluationContext) -> bool:
    passes = context.dataset.passes
    return bool(passes) and bool(passes[0].fields_of(FEATURES))


def _compare(
    model: EvaluatedModel, explain: Explainer | None, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each record, the cosine (nan if a map is zero), the KL and the top-1 agreement, each [n].

    KL and agreement are nan if the pass has no logits.
    """
    stored = batch.targets[0]
    images = view_images(batch, model.input_size)
    cosine = torch.full((len(images), 1), float("nan"))
    if explain is None:
        logits = model.network(images).logits
    else:
        assert stored.explained_class is not None
        output = forward_to_explain(model.network, images)
        logits = output.logits.detach()
        recomputed = explain(model.network, output, stored.explained_class)
        grid = (recomputed.shape[-2], recomputed.shape[-1])
        moved = view_maps(batch, stored, grid)
        cosine, valid = map_cosine(moved, recomputed, model.input_size)
        cosine = cosine.masked_fill(~valid, float("nan"))
    if stored.logits is None:
        unknown = torch.full((len(images),), float("nan"))
        return cosine.flatten().cpu(), unknown, unknown
    before, after = (
        outcome_log_probs(each, stored.logits, tau=1.0) for each in (stored.logits, logits)
    )
    kl = F.kl_div(before, after, reduction="none", log_target=True).sum(dim=1)
    agrees = top_class(stored.logits) == logits.argmax(dim=1)
    return cosine.flatten().cpu(), kl.cpu(), agrees.cpu()


_PAGE = Page(
    "Equivariance",
    "Equivariance of the teacher",
    "How far the targets that frozen mode gives a student (the stored logits, and the stored map warped with the view) "
    "are from what the teacher computes for the view, for each kind of augmentation alone and always applied. The "
    f"column {UNMOVED} is the whole frame.",
    (
        Quantity(
            "map_cosine",
            "Cosine of the moved map with the new one",
            "Mean cosine of the stored map, warped with the view, with the teacher's map of that view.",
        ),
        Quantity(
            "logits_kl",
            "KL of stored to new logits",
            "Mean KL divergence of the stored logits from the teacher's logits of the view, in nats.",
        ),
        Quantity(
            "top1_agreement",
            "Top-1 class unchanged",
            "Fraction of records whose top-1 class is that of the stored logits.",
            Metric(higher_is_better=None),
        ),
        Quantity(
            "features_lost",
            "Variance of the features that is lost",
            "1 - R^2 of the stored features, warped with the view, against the teacher's features of that view, over "
            "the cells inside of the frame, mean over stages.",
            Metric(higher_is_better=False),
        ),
    ),
)
EVALUATOR = Evaluator(evaluate_equivariance, check_equivariance, _PAGE)
