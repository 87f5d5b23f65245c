"""Judge a finished student, or its teacher: how right it is, how close to its teacher, and where it looks.

    python -m stages.evaluate experiment=demo
    python -m stages.evaluate store.path=stores/demo run=my-student evaluate.splits=[test]
    python -m stages.evaluate experiment=demo judges=[accuracy,localization,shift] evaluate.shift.pixels=4
    python -m stages.evaluate experiment=demo subject=teacher
    python -m stages.evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own

Reads   runs/<run>/distill/ and <store.path>; the teacher's side comes from the store, and its network
        (teacher=, teacher.weights=) is read by judges that ask it again, and with subject=teacher
Writes  runs/<run>/evaluate/ (evaluate-teacher/): metrics.json, records.parquet, pictures.safetensors, config.yaml
Again   each judge is a unit of work: one that is done is left as it is
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cli import main
from pipeline.config.runs import open_run
from pipeline.evaluation.baselines import named_baselines, with_baselines
from pipeline.evaluation.results import (
    METRICS_NAME,
    missing_judges,
    read_findings,
)
from pipeline.evaluation.subjects import open_student, open_teacher

if TYPE_CHECKING:
    from pipeline.config.verbs import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split; fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]


def run(config: EvaluateConfig, name: str = "evaluate") -> EvaluateResult:
    """Judge the subject on each split, by each judge that has not done so.

    name  of the folder to write in the run's: evaluations of other splits lie side by side
    """
    if config.subject == "teacher":  # who is compared with no other student
        config = with_baselines(config, dict.fromkeys(named_baselines(config)))
        judged, name = open_teacher(config), f"{name}-teacher"
    else:
        judged = open_student(config)
    inputs = {
        config.subject: judged.fingerprint,
        "store": judged.store.manifest.fingerprint,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in judged.passes},
    }
    folder = open_run(name, config.run, config.shared, inputs)
    missing = missing_judges(folder, config)
    if missing:
        from pipeline.evaluation.run import run_judges  # imports torch

        run_judges(config, judged, folder, missing)
    splits = read_findings(folder)["splits"]
    return EvaluateResult(metrics=str(folder / METRICS_NAME), splits=splits)


if __name__ == "__main__":
    main("evaluate", run, __doc__)
