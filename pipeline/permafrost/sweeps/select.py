"""Selection of the point of each variant to report, and of epochs, by metrics on splits that are not reported."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

from permafrost.config.distillation import DistillConfig
from permafrost.config.points import point_label
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.evaluator import best_position, comparable_metrics, metric_of, numbers_of
from permafrost.evaluation.inputs import open_record_store
from permafrost.evaluation.results import read_results
from permafrost.loading.subset import HOLDOUT, rows_of_split
from permafrost.sweeps.runner import Student

logger = logging.getLogger("permafrost.sweep")


def split_and_metric(select: str) -> tuple[str, str]:
    """Split the option `select`, such as val.accuracy, into split and metric.

    Raises:
        ConfigError: If the metric is unknown.
    """
    split, _, metric = select.partition(".")
    require(
        metric_of(metric) is not None,
        f"select={select} names an unknown metric; choose one of {', '.join(comparable_metrics())}",
    )
    return split, metric


def check_selection(select: str, trained: DistillConfig, evaluate: EvaluateConfig) -> None:
    """Check that the split of `select` exists and is neither trained on nor reported.

    Args:
        select: Option of the sweep.
        trained: Options of a student's training.
        evaluate: Options of its evaluation.

    Raises:
        ConfigError: If the split cannot be used.
    """
    split, _ = split_and_metric(select)
    require(
        split not in evaluate.evaluate.splits,
        f"select={select}: {split} is one of evaluate.splits, on which the selected students are reported; "
        "select on another split",
    )
    require(
        split != trained.split or evaluate.evaluate.store is not None,
        f"select={select}: students are trained on {split}; hold out records with subset.holdout=10 and set "
        f"select={HOLDOUT}.accuracy",
    )
    if split == HOLDOUT:
        require(
            trained.subset.holdout > 0,
            f"select={select}, but subset.holdout=0 holds out no records; set it to a number per class, as in "
            "subset.holdout=10",
        )
    else:
        rows_of_split(open_record_store(evaluate).index, split)


def check_reported_epochs(trained: DistillConfig, evaluate: EvaluateConfig) -> None:
    """Check that no split is reported on which the epoch of each student is chosen. Splits of another store may be.

    Raises:
        ConfigError: If one is.
    """
    if trained.select_epoch is None or evaluate.evaluate.store not in (None, trained.store.path):
        return
    split = trained.select_epoch.partition(".")[0]
    require(
        split not in evaluate.evaluate.splits,
        f"select_epoch={trained.select_epoch}: {split} is one of evaluate.splits, on which the students are reported; "
        "choose the epoch on another split, as in select_epoch=holdout.accuracy with subset.holdout=10",
    )


def choose(
    students: Sequence[Student], split: str, metric: str
) -> tuple[list[dict[str, Any]], list[Student]]:
    """Choose the best point of each variant by the mean of the metric over its seeds.

    A variant with a missing student is skipped.

    Args:
        students: All students of the sweep.
        split: Split of the metric.
        metric: Name of the metric.

    Returns:
        All evaluated students as rows with their values, and the students of each variant's best point.

    Raises:
        ConfigError: If the metrics of an evaluated student lack this one.
    """
    values = {
        student.name: _value(student, split, metric)
        for student in students
        if student.selection_run(split, metric).is_done
    }
    variants: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for student in students:
        variants[student.variant][point_label(student.point)].append(student.name)
    chosen: set[str] = set()
    for variant, points in variants.items():
        candidates = list(points.values())
        if all(name in values for names in candidates for name in names):
            means = [mean(values[name] for name in names) for names in candidates]
            read = metric_of(metric)
            assert read is not None
            best = best_position(means, read)
            chosen |= set(candidates[best])
            if (tied := means.count(means[best])) > 1:
                logger.warning(
                    "variant %s: %d grid points have the same %s, %.4f; the first is selected, %s",
                    variant,
                    tied,
                    f"{split}.{metric}",
                    means[best],
                    list(points)[best],
                )
    rows = [
        {**student.row, "value": values[student.name], "chosen": student.name in chosen}
        for student in students
        if student.name in values
    ]
    return rows, [student for student in students if student.name in chosen]


def _value(student: Student, split: str, metric: str) -> float:
    path = student.selection_run(split, metric).metrics
    numbers = numbers_of(read_results(path.parent)["splits"].get(split, {}))
    value = numbers.get(metric, math.nan)
    if math.isnan(value):
        known = [name for name, number in numbers.items() if metric_of(name) and number == number]
        raise ConfigError(
            f"select={split}.{metric}, but {path} has no {metric}; choose one of {', '.join(known)}"
        )
    return float(value)
