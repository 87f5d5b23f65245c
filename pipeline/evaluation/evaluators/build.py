"""The judges by name: each looks at one split and gives its numbers.

A judge that sums over records does so in partial sums that merge: the same numbers whether one process sees all of
a split or several see a part of it each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.core.errors import ConfigError
from pipeline.evaluation.context import Trial
from pipeline.evaluation.evaluators.class_similarity import (
    check_class_similarity,
    judge_class_similarity,
)
from pipeline.evaluation.evaluators.diffroar.evaluator import check_diffroar, judge_diffroar
from pipeline.evaluation.evaluators.dissection.evaluator import check_dissection, judge_dissection
from pipeline.evaluation.evaluators.distance_correlation.evaluator import (
    check_distances,
    judge_distances,
)
from pipeline.evaluation.evaluators.five_band import check_five_band, judge_five_band
from pipeline.evaluation.evaluators.gradient_alignment import (
    check_gradient_alignment,
    judge_gradient_alignment,
)
from pipeline.evaluation.evaluators.shift import check_shift, shift_curves
from pipeline.evaluation.evaluators.superfeatures import check_superfeatures, judge_superfeatures
from pipeline.evaluation.evaluators.unicam.evaluator import check_unicam, judge_unicam
from pipeline.evaluation.predictions import label_metrics, localization_metrics
from pipeline.models.resolve import require_images

logger = logging.getLogger("permafrost.evaluate")


def _reads_nothing_else(trial: Trial) -> Mapping[str, str]:
    return {}


class Judge(NamedTuple):
    """A member of the family."""

    judge: Callable[[Trial], Mapping[str, Any]]
    """The numbers of one split, JSON; what is large goes to files in trial.folder."""
    check: Callable[[Trial], Mapping[str, str]] = _reads_nothing_else
    """Before anything is computed: ConfigError, saying what it needs and how to give it, where that is not there;
    path -> sha256 of the files that it reads beside the subject, the store and the passes (another student)."""


# ---- the first judges ----------------------------------------------------------------------------


def _accuracy(trial: Trial) -> dict[str, Any]:
    return label_metrics(trial.judged, trial.options.group_sets)


def _localization(trial: Trial) -> dict[str, Any]:
    return localization_metrics(trial.judged)


def _check_localization(trial: Trial) -> Mapping[str, str]:
    if trial.has_regions or trial.has_maps:
        return {}
    needs = (
        f"{trial.split} has no {trial.options.region} and no maps of a teacher to compare with: localization needs "
        "boxes or masks from the data (evaluate.region), or a pass with annotate.payloads=[logits,map]"
    )
    if trial.config.judges is not None:
        raise ConfigError(f"judges={','.join(trial.config.judges)}, but {needs}")
    logger.info("%s", needs)
    return {}


def _shift(trial: Trial) -> dict[str, Any]:
    assert trial.options.max_shift is not None
    return shift_curves(
        trial.subject,
        trial.dataset,
        max_shift=trial.options.max_shift,
        records=trial.options.shift_records,
    )


def _check_shift(trial: Trial) -> Mapping[str, str]:
    if trial.options.max_shift is None:
        raise ConfigError(
            "judges=shift needs evaluate.max_shift, in pixels, as in evaluate.max_shift=32"
        )
    require_images(trial.store, f"evaluate.max_shift={trial.options.max_shift}", "set it to null")
    check_shift("evaluate.max_shift", trial.options.max_shift, trial.subject.input_size)
    return {}


JUDGES: dict[str, Judge] = {
    "accuracy": Judge(_accuracy),
    "localization": Judge(_localization, _check_localization),
    "shift": Judge(_shift, _check_shift),
    "superfeatures": Judge(judge_superfeatures, check_superfeatures),
    "distance_correlation": Judge(judge_distances, check_distances),
    "unicam": Judge(judge_unicam, check_unicam),
    "gradient_alignment": Judge(judge_gradient_alignment, check_gradient_alignment),
    "class_similarity": Judge(judge_class_similarity, check_class_similarity),
    "five_band": Judge(judge_five_band, check_five_band),
    "dissection": Judge(judge_dissection, check_dissection),
    "diffroar": Judge(judge_diffroar, check_diffroar),
}
