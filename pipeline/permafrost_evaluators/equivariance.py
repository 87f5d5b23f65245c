"""Evaluator `equivariance`: stored targets of a transformed view compared with the teacher's output on that view.

Frozen mode keeps a record's logits and applies the view's transform to its map. Both are approximations. Their
quality depends on the teacher and on the augmentation, and this module measures it for each operation alone and for the
whole recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.annotation.lost_variance import LostVariance, add_lost_variance
from permafrost.config.augment import AnyOperation, AugmentOptions, MixConfig
from permafrost.core.batches import Batch, MixedMapTargets, StoredTargets, top_class
from permafrost.core.errors import require
from permafrost.core.records import FEATURES
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import Evaluator, Metric, Page, Quantity
from permafrost.evaluation.forward import EvaluatedModel
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, view_images, view_maps, view_targets
from permafrost.loading.mixtures import mix_targets
from permafrost.loading.random_views import schedule_views
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.transfer import move_values
from permafrost.loading.windows import in_views
from permafrost.losses.logit_distances import outcome_log_probs
from permafrost.losses.map_distances import map_cosine
from permafrost.models.classifier import Intermediates, ModelOutput
from permafrost.models.explanations import Explainer, explainer_named, forward_to_explain
from permafrost.models.resolve import require_images
from permafrost_evaluators.options import EquivarianceOptions

UNMOVED = "none"
"""Name of the measurement on the whole frame. For a teacher of whole frames it shows the error of the store's rounding
alone."""
RECIPE = "recipe"
"""Name of the measurement of all operations together, each with its own probability."""


def check_equivariance(context: EvaluationContext) -> None:
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
        "this teacher and annotate.outputs=[logits,maps], or name its pass with store.teacher=",
    )


def evaluate_equivariance(context: EvaluationContext) -> dict[str, dict[str, float]]:
    """Measure each operation of `augment`, always applied, and the whole recipe, on records drawn with a fixed seed.

    Returns:
        The metrics of `compare_views` and `compare_mixtures` by name, without those that the pass has no fields for.
    """
    dataset = context.dataset
    order = np.random.default_rng(0).permutation(len(dataset))
    positions = np.sort(order[: context.options.of(EquivarianceOptions).records])
    if _has_features(context):
        rows = dataset.rows_at(np.arange(len(dataset)))
        context = replace(context, dataset=context.open_rows(rows, dataset.passes, FEATURES))
    recipes = recipes_of(context.config.augment.operations)
    batches = context.iter_batches(positions.tolist())
    metrics = compare_views(context.model, context.dataset, recipes, batches)
    explainer = context.dataset.passes[0].explainer
    kinds: list[str] = []
    for mix in context.config.augment.mix:
        kinds.append(mix.kind)
        count = kinds.count(mix.kind)
        name = mix.kind if count == 1 else f"{mix.kind}_#{count}"
        batches = context.iter_batches(order[: len(positions)].tolist())  # pairs at random
        for metric, means in compare_mixtures(context.model, mix, name, explainer, batches).items():
            metrics.setdefault(metric, {}).update(means)
    return metrics


def recipes_of(operations: Sequence[AnyOperation]) -> dict[str, tuple[AnyOperation, ...]]:
    """Return what is measured by name: the whole frame, each operation alone and always applied, and all together.

    Args:
        operations: Operations of a recipe. A second one of a kind is named with its number.
    """
    recipes: dict[str, tuple[AnyOperation, ...]] = {UNMOVED: ()}
    for operation in operations:
        same = sum(name.split("_#")[0] == operation.kind for name in recipes)
        name = f"{operation.kind}_#{same + 1}" if same else operation.kind
        recipes[name] = (replace(operation, p=1.0),)
    if len(operations) > 1:
        recipes[RECIPE] = tuple(operations)
    return recipes


@torch.no_grad()
def compare_views(
    model: EvaluatedModel,
    dataset: StoreDataset,
    recipes: Mapping[str, Sequence[AnyOperation]],
    batches: Iterable[Batch],
) -> dict[str, dict[str, float]]:
    """Compare stored targets of the whole frame, warped to views, with the teacher's output on these views.

    As in a training, the views are of the whole frame. The metrics, each a mapping from recipes to numbers, are:

    - map_cosine: mean cosine between the warped stored map and the recomputed map of the stored class, at the teacher's
      input size, without pairs in which either is zero;
    - logits_kl: mean KL(recomputed || stored) of the softmax at temperature 1, in nats;
    - top1_agreement: fraction of records whose stored and recomputed logits have the same top-1 class;
    - features_lost: fraction of the variance of the recomputed features that the warped stored ones miss (1 - R^2),
      over the covered cells of all records, mean over the stages of the pass;
    - features_cosine: cosine of both over the same cells, mean over the stages;
    - probability_spread: standard deviation of the teacher's mean probability (`probability_spread`).

    Args:
        model: The teacher.
        dataset: Records with the teacher's pass of whole frames.
        recipes: Operations by name.
        batches: Batches of the dataset on the model's device.
    """
    augments = {name: AugmentOptions(operations=tuple(each)) for name, each in recipes.items()}
    schedules = {
        name: (
            schedule_views(dataset, augment, seed=0, sampled=True),
            PixelAugmentSchedule(augment, seed=0),
        )
        for name, augment in augments.items()
    }
    (teacher, *_) = dataset.passes
    explain = None if teacher.explainer is None else explainer_named(teacher.explainer)
    has_features = bool(dataset.intermediate_fields[0])
    compared: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in recipes}
    errors: dict[str, dict[str, LostVariance]] = {name: {} for name in recipes}
    start = 0
    for batch in batches:
        sizes = batch.original_size.cpu()
        for name, (views, pixels) in schedules.items():
            view_batch = replace(
                in_views(batch, views.views(0, start, sizes), views.rendering),
                pixel_augment=move_values(pixels.draw(0, start, len(sizes)), model.device),
            )
            images = view_images(view_batch, model.input_size)
            view_batch = replace(view_batch, rendered=images)
            compared[name].append(_compare(model, explain, view_batch))
            if has_features:
                (targets, *_) = view_targets(view_batch, TargetRequest((1, 1), with_maps=False))
                output = model.network(images, Intermediates(stages=True))
                add_lost_variance(errors[name], targets, output, teacher.projections)
        start += len(batch.keys)
    metrics: dict[str, dict[str, float]] = {quantity.name: {} for quantity in _PAGE.quantities}
    for name, parts in compared.items():
        cosine, kl, agrees, probabilities = (
            torch.cat(values).double() for values in zip(*parts, strict=True)
        )
        if explain is not None:
            metrics["map_cosine"][name] = float(cosine.nanmean())
        if errors[name]:
            sums = errors[name].values()
            metrics["features_lost"][name] = mean(total.share() for total in sums)
            metrics["features_cosine"][name] = mean(total.cosine() for total in sums)
        if not kl.isnan().all():
            metrics["logits_kl"][name] = float(kl.mean())
            metrics["top1_agreement"][name] = float(agrees.mean())
        spread = probability_spread(probabilities)
        if spread is not None and not dataset.store.manifest.multi_label:
            metrics["probability_spread"][name] = spread
    return {name: by_recipe for name, by_recipe in metrics.items() if by_recipe}


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Limits of the shares by which `compare_mixtures` divides its records."""


@torch.no_grad()
def compare_mixtures(
    model: EvaluatedModel,
    mix: MixConfig,
    name: str,
    explainer: str | None,
    batches: Iterable[Batch],
) -> dict[str, dict[str, float]]:
    """Compare what the rules make of the targets of two whole images with the teacher's answer to their mixture.

    The metrics are mappings from ranges of a record's share, such as cutmix_25_to_50 in per cent, to numbers:

    - mix_kl: mean KL(answer || rule) in nats at temperature 1, where the rule is the sum of both distributions by their
      shares; only for passes of all logits;
    - mix_agreement: fraction of records for which both have the same first class;
    - mix_cosine: mean cosine of the map of a record's stored class on the mixture with the stored map, on the record's
      cells, at the teacher's input size.

    Args:
        model: The teacher.
        mix: Mixture, which is always applied. The last record of an odd batch has no second one and is left out.
        name: Name of the mixture in the results.
        explainer: Kind of the explainer of the pass, None without maps.
        batches: Batches of the teacher's pass of whole frames, on the model's device.
    """
    schedule = PixelAugmentSchedule(AugmentOptions(mix=(replace(mix, p=1.0),)), seed=0)
    values: dict[str, list[tuple[Tensor, Tensor]]] = {}
    start = 0
    for batch in batches:
        augment = move_values(schedule.draw(0, start, len(batch.keys)), model.device)
        assert augment is not None
        assert augment.mixture is not None
        start += len(batch.keys)
        mixture = augment.mixture
        # Whole images, as the stored targets are.
        batch = replace(batch, canonical_from_view=None, pixel_augment=augment)
        output = forward_to_explain(model.network, view_images(batch, model.input_size))
        grid = (output.features.shape[-2], output.features.shape[-1])
        request = TargetRequest(grid, with_maps=explainer is not None)
        compared: tuple[StoredTargets, ...] = tuple(
            replace(each, intermediates={}, scales={}) for each in batch.targets
        )
        (stored, *_) = view_targets(replace(batch, targets=compared), request)
        paired = mixture.partners != torch.arange(len(mixture.partners), device=model.device)
        shares = mixture.shares
        if isinstance(stored.logits, Tensor):
            pair = stored.logits, stored.logits[mixture.partners]
            first, second = (outputs.log_softmax(dim=1) for outputs in pair)
            weights = shares[:, None]
            by_rule = torch.logaddexp(first + weights.log(), second + (1 - weights).log())
            answer = output.logits.detach().float().log_softmax(dim=1)
            kl = F.kl_div(by_rule, answer, reduction="none", log_target=True).sum(dim=1)
            agrees = by_rule.argmax(dim=1) == answer.argmax(dim=1)
            for metric, each in (("mix_kl", kl), ("mix_agreement", agrees.double())):
                values.setdefault(metric, []).append((shares[paired], each[paired]))
        if explainer is not None:
            rule = mix_targets(stored)
            assert isinstance(rule, MixedMapTargets)
            counted, cosine = _compare_maps(model, explainer_named(explainer), rule, output)
            by_class = torch.cat([shares[:, None], 1 - shares[:, None]], dim=1)
            by_class = by_class.repeat_interleave(cosine.shape[1] // 2, dim=1)
            counted = counted & paired[:, None]
            values.setdefault("mix_cosine", []).append((by_class[counted], cosine[counted]))
    return {metric: _means_of_shares(name, parts) for metric, parts in values.items()}


def _compare_maps(
    model: EvaluatedModel, explain: Explainer, rule: MixedMapTargets, output: ModelOutput
) -> tuple[Tensor, Tensor]:
    """Compare stored maps of both records on their cells with those of the mixture: validity and cosine [B, 2E]."""
    recomputed = explain(model.network, output, rule.target_class)
    pair = (rule.maps * rule.cell_weights, recomputed * rule.cell_weights)
    cosine, valid = map_cosine(*pair, model.input_size)
    return valid & rule.map_valid, cosine


def _means_of_shares(name: str, parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the mean of values in each range of shares that has any, and the mean of all."""
    shares, values = (torch.cat(columns).double().cpu() for columns in zip(*parts, strict=True))
    means = {name: float(values.mean())} if len(values) else {}
    for low, high in pairwise(SHARES):
        if (inside := (shares >= low) & ((shares < high) | (high == SHARES[-1]))).any():
            means[f"{name}_{100 * low:.0f}_to_{100 * high:.0f}"] = float(values[inside].mean())
    return means


SPREAD_BLOCK = 32
"""Records of a block of `probability_spread`. Numbers of other blocks are not comparable."""


def probability_spread(probabilities: Tensor) -> float | None:
    """Compute the standard deviation of a teacher's mean probability (Wang et al. 2022, "T. stddev").

    Views of a good augmentation for distillation have a low one: blocks of records then look alike to the teacher. With
    p_b,k the mean probability of class k over the records of block b, it is the mean over k of the standard deviation
    of p_b,k over the blocks (divided by their number - 1). The paper's code has blocks of five batches of 64.

    Args:
        probabilities: Softmax of the teacher's logits, f64 [n, K]. Blocks of SPREAD_BLOCK records are drawn with a
            fixed seed, and those left over are not counted.

    Returns:
        The number, None for fewer than two blocks.
    """
    if (blocks := len(probabilities) // SPREAD_BLOCK) < 2:
        return None
    order = np.random.default_rng(0).permutation(len(probabilities))[: blocks * SPREAD_BLOCK]
    drawn = probabilities[torch.from_numpy(order)].reshape(blocks, SPREAD_BLOCK, -1)
    return float(drawn.mean(dim=1).std(dim=0).mean())


def _has_features(context: EvaluationContext) -> bool:
    passes = context.dataset.passes
    return bool(passes) and bool(passes[0].fields_of(FEATURES))


def _compare(
    model: EvaluatedModel, explain: Explainer | None, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare the stored targets of a batch's views with the teacher's output.

    Returns:
        Cosine of the maps [n], nan if a map is zero; KL divergence [n], and whether the top-1 class is the same [n],
        both nan if the pass has no logits; softmax of the teacher's logits of the view [n, K].
    """
    stored = batch.targets[0]
    images = view_images(batch, model.input_size)
    cosine = torch.full((len(images), 1), float("nan"))
    if explain is None:
        logits = model.network(images).logits
    else:
        assert stored.target_class is not None
        output = forward_to_explain(model.network, images)
        logits = output.logits.detach()
        recomputed = explain(model.network, output, stored.target_class)
        moved = view_maps(batch, stored, (recomputed.shape[-2], recomputed.shape[-1]))
        cosine, valid = map_cosine(moved, recomputed, model.input_size)
        cosine = cosine.masked_fill(~valid, float("nan"))
    probabilities = logits.softmax(dim=1).cpu()
    if stored.logits is None:
        unknown = torch.full((len(images),), float("nan"))
        return cosine.flatten().cpu(), unknown, unknown, probabilities
    before, after = (
        outcome_log_probs(outputs, stored.logits, tau=1.0) for outputs in (stored.logits, logits)
    )
    kl = F.kl_div(before, after, reduction="none", log_target=True).sum(dim=1)
    agrees = top_class(stored.logits) == logits.argmax(dim=1)
    return cosine.flatten().cpu(), kl.cpu(), agrees.cpu(), probabilities


_PAGE = Page(
    "Equivariance",
    "Equivariance of the teacher",
    "How far the targets that frozen mode gives a student (the stored logits, and the stored map warped with the view) "
    "are from what the teacher computes for the view, for each operation alone and always applied. The column "
    f"{UNMOVED} is the whole frame, and {RECIPE} all operations together.",
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
        Quantity(
            "features_cosine",
            "Cosine of the moved features with the new ones",
            "Cosine of the stored features, warped with the view, with the teacher's features of that view, over the "
            "same cells, mean over stages.",
        ),
        Quantity(
            "probability_spread",
            "Spread of the teacher's mean probability",
            f"Standard deviation of the teacher's mean probability over blocks of {SPREAD_BLOCK} records, mean over "
            "classes (Wang et al. 2022). Of two augmentations, the one with the lower number is expected to be better "
            "for distillation.",
            Metric(higher_is_better=False, scale=1.0, digits=4),
        ),
        Quantity(
            "mix_kl",
            "KL of the rule to the answer to a mixture",
            "Mean KL divergence of the sum of both records' stored distributions by their shares from the teacher's "
            "answer to the mixture of their images, in nats, by the share of the record.",
        ),
        Quantity(
            "mix_agreement",
            "Top-1 class of the rule and of the answer to a mixture",
            "Fraction of mixtures for which both have the same first class.",
            Metric(higher_is_better=None),
        ),
        Quantity(
            "mix_cosine",
            "Cosine of the stored map with that of the mixture",
            "Mean cosine of a record's stored map with the teacher's map of the same class on the mixture, on the "
            "cells of the record, by its share.",
        ),
    ),
)
EVALUATOR = Evaluator(evaluate_equivariance, check_equivariance, _PAGE)
