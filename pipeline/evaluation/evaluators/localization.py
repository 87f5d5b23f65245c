"""EPG and IoU of explanations, and their cosine with the teacher's stored maps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.evaluation.context import Trial
from pipeline.evaluation.evaluators.evaluator import Evaluator
from pipeline.evaluation.predictions import localization_metrics

logger = logging.getLogger("permafrost.evaluate")


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


EVALUATOR = Evaluator(_localization, _check_localization)
