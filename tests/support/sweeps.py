"""A sweep of tiny students."""

from __future__ import annotations

import json

from permafrost.runs.mirrors import RUNS
from tests.support.composition import config_of
from tests.support.verbs import sweep

TINY = (
    *("student.name=resnet8", "student.width=4"),
    *("trainer.epochs=1", "trainer.batch_size=8", "seeds=[0]", "evaluate.num_pictures=1"),
)


TWO_VARIANTS = "variants={kd: ['method=kd'], e2kd: ['method=e2kd']}"


def sweep_arguments(frozen, *more, run="grid"):
    return [f"store.path={frozen.store.path}", f"run={run}", *TINY, "executor=serial", *more]


def sweep_config(base):
    return config_of("sweep", *base)


def run_sweep(base):
    return sweep.run(sweep_config(base), base)


def read_sweep(run="grid"):
    """Entries of sweep.json, with the names of the students' runs in full."""
    values = json.loads((RUNS / run / "sweep.json").read_text())
    for row in (*values["runs"], *values.get("candidates", ())):
        row["run"] = f"{run}/{row['run']}"
    return values
