"""Evaluate a finished student, or its teacher: accuracy, agreement with the teacher and localization.

    python -m stages.evaluate experiment=demo
    python -m stages.evaluate store.path=stores/demo run=my-student evaluate.splits=[test]
    python -m stages.evaluate experiment=demo evaluators=[accuracy,localization,shift] evaluate.shift.pixels=4
    python -m stages.evaluate experiment=demo model=teacher
    python -m stages.evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own

Reads   runs/<run>/distill/ and <store.path>, including its teacher passes; the teacher's network (teacher=,
        teacher.weights=) is needed only by some evaluators and with model=teacher
Writes  runs/<run>/evaluate/ (evaluate-teacher/): metrics.json, records.parquet, pictures.safetensors, config.yaml
Rerun   each evaluator is a unit of work, and finished evaluators are skipped
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cli import main
from pipeline.config.runs import open_run
from pipeline.evaluation.baselines import named_baselines, with_baselines
from pipeline.evaluation.inputs import open_student, open_teacher
from pipeline.evaluation.results import (
    METRICS_NAME,
    missing_evaluators,
    read_results,
)

if TYPE_CHECKING:
    from pipeline.config.verbs import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split, as fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]


def run(config: EvaluateConfig, name: str = "evaluate") -> EvaluateResult:
    """Run the missing evaluators for the student, or its teacher, on each split.

    name  folder to write within the run's folder, different for evaluations on other splits
    """
    if config.model == "teacher":  # a teacher is not compared with another student
        config = with_baselines(config, dict.fromkeys(named_baselines(config)))
        inputs, name = open_teacher(config), f"{name}-teacher"
    else:
        inputs = open_student(config)
    fingerprints = {
        config.model: inputs.fingerprint,
        "store": inputs.store.manifest.fingerprint,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in inputs.passes},
    }
    folder = open_run(name, config.run, config.shared, fingerprints)
    missing = missing_evaluators(folder, config)
    if missing:
        from pipeline.evaluation.run import run_evaluators  # imports torch

        run_evaluators(config, inputs, folder, missing)
    splits = read_results(folder)["splits"]
    return EvaluateResult(metrics=str(folder / METRICS_NAME), splits=splits)


if __name__ == "__main__":
    main("evaluate", run, __doc__)
