"""Evaluate a finished student, its teacher or a given network: accuracy, agreement with the teacher and localization.

    permafrost evaluate experiment=demo
    permafrost evaluate run=my-student evaluate.splits=[test]      (on the store that it was trained from)
    permafrost evaluate experiment=demo evaluators=[accuracy,localization,shift] evaluate.shift.pixels=4
    permafrost evaluate experiment=demo model=teacher
    permafrost evaluate experiment=demo model=teacher evaluators=[equivariance] augment=pad_crop_flip
    permafrost evaluate store.path=stores/demo run=pair model=network student=timm student.weights=pretrained
    permafrost evaluate store.path=stores/other-images run=transferred evaluate.store=stores/teachers-own
    permafrost evaluate store.path=stores/demo run=my-student evaluate.against=first-teacher

Reads   runs/<run>/distill/ and <store.path>, including its teacher passes; the teacher's network (teacher=,
        teacher.weights=) is needed only by some evaluators and with model=teacher. With model=network the network
        of student= and student.weights= takes the place of runs/<run>/distill/
Writes  runs/<run>/evaluate/: metrics.json, records.parquet, pictures.safetensors, config.yaml; the results
        of a teacher are in evaluate-teacher/, those of a given network in evaluate-network/, those against another
        pass in evaluate-against-<pass>/, those of further splits or frames in evaluate-on-<splits>[-<frame>]/, and
        those on another store than that of the training in evaluate-in-<store>/.
        Those of a student are also in the tracker's run of its training (logger=)
Rerun   each evaluator is a unit of work, and finished evaluators are skipped
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from permafrost.config.evaluation import feature_probes
from permafrost.config.verbs import EvaluateConfig, Plan, report_command
from permafrost.evaluation.evaluator import align_columns, interval_of, main_numbers, numbers_of
from permafrost.evaluation.inputs import EvaluationInputs, open_inputs, without_unknown_variants
from permafrost.evaluation.results import (
    MAPS,
    METRICS_NAME,
    PER_LABEL,
    PICTURE,
    RANDOM_NETWORKS,
    TEACHER_PICTURE,
    folder_of_evaluation,
    keep_options,
    label_rows,
    lacking_networks,
    missing_evaluators,
    read_results,
    without_outputs,
)
from permafrost.evaluation.trained_student import UNTRAINED, TrainedStudent
from permafrost.runs.trackers import TrackedRun

logger = logging.getLogger("permafrost.evaluate")


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split, as fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]
    """Metrics of each split, with a table of the labels where records have many."""
    picture: str = ""
    """Picture of an image that the network received, empty for a table."""
    teacher_picture: str = ""
    """Picture that its teacher received for the compared pass, whose numbers are among the results."""
    maps: str = ""
    """Explainers of the two maps that map_cosine compares, empty if they are the same."""
    classifier: str = ""
    """Fault of the last layer of a student, whose logits and maps mean nothing then."""
    next: str = ""

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """Numbers by split, without the scores of each label and the outputs of an untrained last layer."""
        return {
            split: numbers_of({name: value for name, value in metrics.items() if name != PER_LABEL})
            for split, metrics in self._measured.items()
        }

    @property
    def _measured(self) -> dict[str, dict[str, Any]]:
        """Metrics by split, without the outputs of an untrained last layer."""
        return {
            split: without_outputs(metrics) if self.classifier else metrics
            for split, metrics in self.splits.items()
        }

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal: the file, and a table of the numbers with a column per split.

        The table has the main numbers of each evaluator, and a column of the untrained networks that were measured.
        Each split with many labels has a table of them, too.
        """
        columns = {
            split: {
                name: _format_value(value, interval_of(self.numbers[split], name))
                for name, value in main_numbers(metrics).items()
            }
            for split, metrics in self._measured.items()
        }
        for split in self.splits:
            if levels := [
                main_numbers(level) for level in self.splits[split].get(RANDOM_NETWORKS, ())
            ]:
                title = f"random networks ({len(levels)})" + f", {split}" * (len(self.splits) > 1)
                shared = set.intersection(*map(set, levels))
                spreads = {
                    name: [level[name] for level in levels] for name in levels[0] if name in shared
                }
                columns[title] = {  # without what does not depend on the network
                    name: _format_levels(values)
                    for name, values in spreads.items()
                    if {*values} != {main_numbers(self.splits[split]).get(name)}
                    and not name.endswith(("_low", "_high"))
                }
        names = dict.fromkeys(chain.from_iterable(columns.values()))
        rows = [
            ["", *columns],
            *([name, *(column.get(name, "-") for column in columns.values())] for name in names),
        ]
        return {
            "metrics": self.metrics,
            "picture": self.picture,
            "teacher_picture": "" if self.teacher_picture == self.picture else self.teacher_picture,
            "maps": self.maps,
            "classifier": self.classifier,
            "results": "\n" + align_columns(rows),
            **{
                f"labels of {split}": "\n" + align_columns(label_rows(metrics[PER_LABEL]))
                for split, metrics in self.splits.items()
                if PER_LABEL in metrics and len(metrics[PER_LABEL]) <= _MAX_LABELS
            },
            "next": self.next,
        }


_MAX_LABELS = 40
"""Largest number of labels whose table is printed."""


def _format_value(value: float, interval: tuple[float, float] | None = None) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return text if interval is None else f"{text} ({interval[0]:.4f} to {interval[1]:.4f})"


def _format_levels(values: Sequence[float]) -> str:
    spread = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{spread}"


def evaluate_run(config: EvaluateConfig) -> EvaluateResult:
    """Run the missing evaluators, without comparing a single student with a variant that only its experiment names."""
    return evaluate_student(without_unknown_variants(config, config.command))


def evaluate_student(config: EvaluateConfig, name: str | None = None) -> EvaluateResult:
    """Run the missing evaluators for the student, its teacher or the given network, on each split.

    Args:
        config: Options of the command.
        name: Folder to write within the run's folder, None for the one that the options determine.

    Raises:
        ConfigError: If a network, a pass, the package of `logger` or a requirement of an evaluator is missing, or an
            evaluator was run with other options.
        StoreMismatchError: If a pass does not fit the network.
    """
    return plan_evaluation(config, name).run()


def plan_evaluation(config: EvaluateConfig, name: str | None = None) -> EvaluationPlan:
    """Resolve the options of an evaluation, and open what it reads.

    Args:
        config: Options of the command.
        name: As in `evaluate_student`.

    Raises:
        ConfigError: If a network, a pass or the package of `logger` is missing.
        StoreMismatchError: If a pass does not fit the network.
    """
    inputs = open_inputs(config)
    usual = folder_of_evaluation(
        inputs.run_folder.path,
        inputs.main,
        inputs.config.evaluate,
        inputs.trained.picture,
        inputs.fingerprints,
    )
    path = inputs.run_folder.path / (name or usual)
    inputs = replace(inputs, config=keep_options(inputs.config, path))
    return EvaluationPlan(
        inputs=inputs,
        folder=path,
        is_selection=name not in (None, usual),
        missing=missing_evaluators(path, inputs.config),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(Plan):
    """An evaluation: what it reads, its folder, and the evaluators whose results the folder lacks."""

    inputs: EvaluationInputs
    folder: Path
    is_selection: bool
    """True for one by which a sweep selects a point."""
    missing: tuple[str, ...]

    def describe_work(self) -> dict[str, str]:
        inputs, config = self.inputs, self.inputs.config
        return {
            "network": f"{config.model} of run {config.run}",
            "records": f"split {', '.join(config.evaluate.splits)} of {inputs.store.path}",
            "passes": ", ".join(teacher.name for teacher in inputs.passes) or "none",
            **inputs.pictures,
            "evaluators": f"runs {', '.join(self.missing)}" if self.missing else "nothing to run",
            "folder": str(self.folder),
        }

    def run(self) -> EvaluateResult:
        """Run the missing evaluators, and return the results of all of them."""
        inputs, config, run = self.inputs, self.inputs.config, self.inputs.run_folder
        place = self.folder.relative_to(run.path).as_posix()
        with run.open(place, config.shared, inputs.fingerprints) as folder:
            missing = missing_evaluators(folder, config)  # another process may have finished
            count, missing_levels = lacking_networks(read_results(folder), config)
            if 0 < (config.evaluate.random_networks or 0) < count:
                logger.info("%d untrained networks were measured before, and stay", count)
            if not self.is_selection:
                logger.info(
                    "%(network)s on %(records)s: %(evaluators)s; into %(folder)s",
                    self.describe_work(),
                )
                if config.model == "student":
                    _warn_of_chosen_epoch(inputs)
            if missing or missing_levels:
                from permafrost.evaluation.run import run_evaluators  # imports torch

                run_evaluators(inputs, folder, missing)
            results = read_results(folder)
        result = _describe_results(inputs, folder, results)
        if missing:
            training = run.path / "distill" if config.model == "student" else folder
            tracked = TrackedRun(config.logger, config.run, training.absolute())
            tracked.add_results(place, result.numbers)
        return result


def _describe_results(
    inputs: EvaluationInputs, folder: Path, results: dict[str, Any]
) -> EvaluateResult:
    """Return the results with the command to run next."""
    config, store = inputs.config, inputs.store
    student = TrainedStudent(inputs.run_folder.path / "distill")
    is_untrained = config.model == "student" and not student.trains_classifier
    after = report_command(config.store.path, config.run)
    is_probed = bool(results["evaluators"].keys() & feature_probes())
    if is_untrained and not is_probed and store.manifest.classes:
        after = student.evaluate_command(config.run, store, config.evaluate.splits)
    return EvaluateResult(
        metrics=str(folder / METRICS_NAME),
        splits=results["splits"],
        picture=results[PICTURE],
        teacher_picture=results[TEACHER_PICTURE],
        maps=results[MAPS],
        classifier=UNTRAINED if is_untrained else "",
        next=after,
    )


def _warn_of_chosen_epoch(inputs: EvaluationInputs) -> None:
    """Warn of results on the split by which the student's epoch was chosen."""
    student = TrainedStudent(inputs.run_folder.path / "distill")
    metric = student.epoch_metric(inputs.store.manifest.fingerprint)
    if (split := (metric or "").partition(".")[0]) in inputs.config.evaluate.splits:
        logger.warning(
            "the epoch of this student was chosen by %s (select_epoch), so its results on %s look better than they "
            "are; report another split",
            metric,
            split,
        )
