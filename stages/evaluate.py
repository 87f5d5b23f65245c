"""Evaluate a finished student, its teacher or a given network: accuracy, agreement with the teacher and localization.

    permafrost evaluate experiment=demo
    permafrost evaluate store.path=stores/demo run=my-student evaluate.splits=[test]
    permafrost evaluate experiment=demo evaluators=[accuracy,localization,shift] evaluate.shift.pixels=4
    permafrost evaluate experiment=demo model=teacher
    permafrost evaluate store.path=stores/demo run=pair model=network student=timm student.weights=pretrained
    permafrost evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own
    permafrost evaluate store.path=stores/demo run=my-student evaluate.against=first-teacher

Reads   runs/<run>/distill/ and <store.path>, including its teacher passes; the teacher's network (teacher=,
        teacher.weights=) is needed only by some evaluators and with model=teacher. With model=network the network
        of student= and student.weights= takes the place of runs/<run>/distill/
Writes  runs/<run>/evaluate/: metrics.json, records.parquet, pictures.safetensors, config.yaml; the results
        of a teacher are in evaluate-teacher/, those of a given network in evaluate-network/, those against a named
        pass in evaluate-against-<pass>/
Rerun   each evaluator is a unit of work, and finished evaluators are skipped
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cli import main
from pipeline.config.runs import RUNS, open_run
from pipeline.evaluation.baselines import (
    named_baselines,
    with_baselines,
    without_unknown_arms,
)
from pipeline.evaluation.inputs import epoch_metric, open_network, open_student, open_teacher
from pipeline.evaluation.results import (
    METRICS_NAME,
    NETWORK_EVALUATION,
    TEACHER_EVALUATION,
    evaluation_folder,
    missing_evaluators,
    read_results,
)
from pipeline.report.summary import align_columns

if TYPE_CHECKING:
    from pipeline.config.verbs import EvaluateConfig
    from pipeline.evaluation.inputs import EvaluationInputs

logger = logging.getLogger("permafrost.evaluate")


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split, as fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]
    next: str = ""

    def printed(self) -> dict[str, str]:
        """Values for the terminal: the file, and a table of the numbers that are not nested, a column per split."""
        names = {
            name: None
            for metrics in self.splits.values()
            for name, value in metrics.items()
            if isinstance(value, (int, float))
        }
        rows = [["", *self.splits]]
        for name in names:
            values = [metrics.get(name) for metrics in self.splits.values()]
            rows.append([name, *(_shown(value) for value in values)])
        return {"metrics": self.metrics, "results": "\n" + align_columns(rows), "next": self.next}


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def run(config: EvaluateConfig, name: str | None = None) -> EvaluateResult:
    """Run the missing evaluators for the student, its teacher or the given network, on each split.

    name  folder to write within the run's folder, if it is not the one that the options determine
    """
    if config.model == "teacher":  # a teacher is not compared with another student
        config = with_baselines(config, dict.fromkeys(named_baselines(config)))
        inputs, own = open_teacher(config), TEACHER_EVALUATION
    elif config.model == "network":
        inputs, own = open_network(config), NETWORK_EVALUATION
    else:
        inputs, own = open_student(config), evaluation_folder(config.evaluate.against)
    fingerprints = {
        config.model: inputs.fingerprint,
        "store": inputs.store.manifest.fingerprint,
        **inputs.others,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in inputs.passes},
    }
    with open_run(name or own, config.run, config.shared, fingerprints) as folder:
        missing = missing_evaluators(folder, config)
        if name in (None, own):  # not one of a sweep's selections
            logger.info(
                "%s of run %s on split %s of %s: %s; %s",
                config.model,
                config.run,
                ", ".join(config.evaluate.splits),
                config.evaluate.store or config.store.path,
                f"runs {', '.join(missing)}" if missing else "nothing to run",
                f"into {folder}",
            )
            if config.model == "student":
                _warn_of_chosen_epoch(config, inputs)
        if missing:
            from pipeline.evaluation.run import run_evaluators  # imports torch

            run_evaluators(config, inputs, folder, missing)
        splits = read_results(folder)["splits"]
    return EvaluateResult(
        metrics=str(folder / METRICS_NAME),
        splits=splits,
        next=f"permafrost report store.path={config.store.path} run={config.run}",
    )


def _warn_of_chosen_epoch(config: EvaluateConfig, inputs: EvaluationInputs) -> None:
    """Warn of results on the split by which the student's epoch was chosen."""
    metric = epoch_metric(RUNS / config.run, inputs.store.manifest.fingerprint)
    split = (metric or "").partition(".")[0]
    if split in config.evaluate.splits:
        logger.warning(
            "the epoch of this student was chosen by %s (select_epoch), so its results on %s look better than they "
            "are; report another split",
            metric,
            split,
        )


if __name__ == "__main__":
    main("evaluate", lambda config: run(without_unknown_arms(config, sys.argv[1:])), __doc__)
