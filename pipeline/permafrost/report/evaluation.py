"""Options and inputs of a finished evaluation, from the config.yaml in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from permafrost.config.builder import build_config
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.runs import CONFIG_NAME, read_config
from permafrost.config.verbs import EvaluationRun
from permafrost.core.errors import require
from permafrost.core.files import RootedPath
from permafrost.evaluation.inputs import epoch_metric
from permafrost.report.results import StudentResult
from permafrost.store.reader import Store, TeacherPass

_TEACHER = "teacher "


class Evaluation(NamedTuple):
    """Options of a finished evaluation, and the inputs that it read."""

    options: EvaluateOptions
    inputs: dict[str, str]
    """Fingerprints by name of the store and of each pass, the latter named "teacher <pass>"."""

    def open_store(self, store: RootedPath) -> Store:
        """Open the store with the evaluated records: evaluate.store or, if it is null, the given one."""
        return Store(replace(store, root=Path(self.options.store)) if self.options.store else store)

    @property
    def teachers(self) -> list[str]:
        """Names of the passes that the network was compared with."""
        return [name.removeprefix(_TEACHER) for name in self.inputs if name.startswith(_TEACHER)]

    def open_passes(self, store: Store) -> list[TeacherPass]:
        """Open those passes that the store still has."""
        held = {folder.name for folder in store.pass_folders()}
        return [store.open_pass(name) for name in self.teachers if name in held]


def optimistic_results(results: Sequence[StudentResult]) -> list[str]:
    """Write one sentence for each metric on a reported split by which the epoch of students was chosen."""
    arms: dict[str, dict[str, None]] = {}
    for result in results:
        if not (result.evaluation / CONFIG_NAME).exists():
            continue
        metric = epoch_metric(result.folder, read_evaluation(result).inputs["store"])
        if metric is not None and metric.partition(".")[0] in result.numbers:
            arms.setdefault(metric, {})[result.label] = None
    return [
        f"The epoch of {', '.join(labels)} was chosen by {metric}, so its values on {metric.partition('.')[0]} look "
        "better than they are."
        for metric, labels in arms.items()
    ]


def read_evaluation(result: StudentResult) -> Evaluation:
    """Read how the results were evaluated."""
    values = read_config(result.evaluation / CONFIG_NAME, EvaluationRun, "inputs", "evaluate")
    require("store" in values["inputs"], f"{result.evaluation / CONFIG_NAME} names no store")
    inputs = {name: digest for name, digest in values["inputs"].items() if name != "student"}
    return Evaluation(build_config(EvaluateOptions, values["evaluate"], "evaluate"), inputs)
