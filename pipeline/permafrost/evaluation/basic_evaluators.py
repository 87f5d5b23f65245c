"""The evaluators `accuracy` and `localization`, which read the predictions of one forward pass."""

from __future__ import annotations

import logging
from typing import Any

from permafrost.config.evaluation import TopKOptions, check_top_k, feature_probes
from permafrost.core.errors import ConfigError
from permafrost.evaluation.context import EvaluationContext, require_one_label
from permafrost.evaluation.evaluator import PER_CENT, Evaluator, Page, Quantity
from permafrost.evaluation.forward import label_metrics, localization_metrics
from permafrost.evaluation.metrics import top_k_accuracy
from permafrost.evaluation.per_label import label_table
from permafrost.evaluation.results import PER_LABEL

logger = logging.getLogger("permafrost.evaluate")


def _accuracy(context: EvaluationContext) -> dict[str, Any]:
    if not context.dataset.has_labels:
        classes, outputs = context.store.manifest.classes, context.predictions.logits.shape[1]
        reason = (
            f"the network has {outputs} outputs, and the labels are of {len(classes)} classes"
            if classes and outputs != len(classes)
            else "no record is labeled"
        )
        logger.warning(
            "%s: accuracy is not measured, because %s; evaluators=[%s] measure features on labels",
            context.split,
            reason,
            ",".join(feature_probes()),
        )
    predictions = context.predictions
    metrics = label_metrics(predictions, context.options.group_sets)
    if context.dataset.has_many_labels:
        classes = context.store.manifest.classes
        metrics[PER_LABEL] = label_table(
            predictions.logits, predictions.labels, predictions.thresholds, classes
        )
    return metrics


ACCURACY = Evaluator(_accuracy)


# ---- localization ----------------------------------------------------------------------------------


def _check_top_k(context: EvaluationContext) -> None:
    require_one_label(context, "top_k")
    classes = len(context.store.manifest.classes)
    check_top_k("evaluate.top_k.k", context.options.of(TopKOptions).k, classes, many=False)


def _top_k(context: EvaluationContext) -> dict[str, Any]:
    predictions = context.predictions
    numbers = context.options.of(TopKOptions).k or (min(5, predictions.logits.shape[1] - 1),)
    return {"accuracy": top_k_accuracy(predictions.logits, predictions.labels, numbers)}


TOP_K = Evaluator(
    _top_k,
    _check_top_k,
    Page(
        "Top-k",
        "Top-k accuracy",
        "How often the label is among the k classes of the highest logits.",
        (
            Quantity(
                "accuracy",
                "Top-k accuracy by k",
                "Fraction of the labeled records; guessing has k / K of K classes of equal size.",
                PER_CENT,
            ),
        ),
    ),
)


def _check_localization(context: EvaluationContext) -> None:
    if context.has_regions or context.has_maps:
        return
    names = [folder.name for folder in context.store.pass_folders()]
    if names and not context.dataset.passes:
        needs = (
            f"no teacher pass is named, and {context.split} has no {context.options.region}; set store.teacher= to one "
            f"of {', '.join(names)}"
        )
    else:
        needs = (
            f"{context.split} has no {context.options.region} (evaluate.region) and no teacher maps; localization "
            "needs one of them, such as a pass with annotate.outputs=[logits,maps]"
        )
    if context.dataset.has_masks or context.dataset.has_boxes:
        needs += f", or evaluate.region={'masks' if context.dataset.has_masks else 'boxes'}"
    if context.config.evaluators is not None:
        raise ConfigError(f"evaluators={','.join(context.config.evaluators)}, but {needs}")
    logger.info("%s", needs)


LOCALIZATION = Evaluator(
    lambda context: localization_metrics(context.predictions), _check_localization
)
