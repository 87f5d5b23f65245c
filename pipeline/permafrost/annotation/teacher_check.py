"""Check of a teacher before its pass begins: its outputs and maps for a sample of records.

A pass of days is not worth its time if the outputs are probabilities, if rounding to float16 loses what tells the
classes apart, if the labels are those of another order of classes, or if the maps are constant.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc, log_softmax
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.outputs import BatchInfo, MapsOutput
from permafrost.annotation.samples import Sample, SampleTask, measure_sample, select_sample
from permafrost.core.errors import UserError, require
from permafrost.core.label_forms import has_many
from permafrost.core.records import IMPOSSIBLE_LOGIT, NO_LABEL
from permafrost.core.tasks import Executor
from permafrost.loading.target_sheet import (
    correct_and_chance,
    describe_empty,
    describe_spread,
    entropy_and_peak,
)
from permafrost.models.classifier import ModelOutput, has_proportions
from permafrost.models.record_independence import DependentRecordsError, require_independent_records
from permafrost.models.trained_weights import count_classes
from permafrost.store.codecs import decode_unit
from permafrost.store.commit_pass import CONSTANT_LOGITS, ConstantLogitsError
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.precompute")

CHECKED_RECORDS = (64, 256)
"""Minimum and maximum sample size, or all records if there are fewer; in between a twentieth of the records."""
_MAP_ROUNDING = 0.1
"""Largest change of a map, relative to its maximum, by the other records of its batch."""
_SAMPLE_SHARE = 20
COARSEST_SPACING = 0.02
"""Largest spacing of float16 at the largest logit of a record, in standard deviations of its logits."""
HIGHEST_ROUNDING_KL = 2e-4
"""Highest mean divergence in nats of the softmax of logits rounded to float16."""
SIGNIFICANCE = 1e-6
"""Maximum p-value to report labels as permuted, or accuracy as below chance."""
_SIGNIFICANCE_OF_SKILL = 0.05
"""Maximum p-value of an accuracy that is taken as better than guessing."""
_UNSURE = 0.8
"""Mean entropy, relative to that of equal probabilities, above which a network may be untrained."""
_SUM_TOLERANCE = 1e-3
_ROUNDING = 1e-6
_MIN_RECORDS = 8
"""Minimum number of records for a property that all of them share not to be a coincidence."""
_MAX_NAMED = 3
_FEW_CELLS = 4
"""Cells per side below which a warning says how many maps have."""


class TeacherError(UserError, ValueError):
    """Error for a teacher whose outputs contradict the options."""


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """Description of a teacher's outputs and maps for a sample of records."""

    records: int
    returns: str
    """Value of teacher.returns, from which the network's outputs were converted."""
    form: str
    """"logits", or "probabilities" or "log_probabilities" if all rows are such."""
    is_constant: bool
    """True if all records have the same outputs, up to rounding."""
    is_within_unit: bool
    """True if every output is in [0, 1]."""
    spacing: float
    """Spacing of float16 at a record's largest logit, in standard deviations of its logits; the median."""
    rounding_kl: float | None
    """Mean divergence in nats of the softmax of logits rounded to float16; None if float16 cannot represent them."""
    labels: list[int]
    """Label of each record, empty without single labels of the teacher's classes."""
    predicted: list[int]
    """Class of the largest logit of each of these records."""
    warning: str = ""
    """Warning about the spread of the softmax of the logits."""
    entropy: float = 0.0
    """Mean entropy of the softmax, 1 for equal probabilities."""
    maps: int = 0
    """Number of maps."""
    constant_maps: int = 0
    """Number of maps that have one value everywhere."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the maps."""
    input_size: tuple[int, int] | None = None
    """(height, width) of the images that the teacher received."""

    def needs_float32(self) -> str:
        """Say why float16 loses too much of the logits, nothing if it does not."""
        if self.rounding_kl is None:
            return f"some are beyond the {np.finfo(np.float16).max:,.0f} of float16"
        if self.spacing > COARSEST_SPACING:
            return f"float16 has steps of {self.spacing:.1%} of the standard deviation of a record's logits"
        if self.rounding_kl > HIGHEST_ROUNDING_KL:
            return f"rounded to float16 they diverge by {self.rounding_kl:.2g} nats"
        return ""

    def require_sound(self, classes: Sequence[str]) -> None:
        """Log warnings about a teacher's outputs, and refuse wrong ones.

        Args:
            classes: Names of the data's classes.

        Raises:
            ConstantLogitsError: If the outputs are the same for all records.
            TeacherError: If the outputs are not what teacher.returns says, the labels are those of another order of
                classes, or all maps are constant.
        """
        require(
            not self.is_constant or self.records < _MIN_RECORDS,
            CONSTANT_LOGITS,
            ConstantLogitsError,
        )
        for message in self._errors(classes):
            raise TeacherError(message)
        if self.is_within_unit and self.form == "logits" and self.records >= _MIN_RECORDS:
            logger.warning(
                "all outputs of the teacher are between 0 and 1, which logits rarely are: remove the sigmoid at its "
                "end, if it has one"
            )
        for warning in (
            self.warning,
            describe_empty(self.constant_maps / max(self.maps, 1), self.maps),
        ):
            if warning:
                logger.warning("%s (in a sample of %d records)", warning, self.records)
        if self.grid and min(self.grid) < _FEW_CELLS:
            logger.warning(
                "the teacher's maps have %dx%d cells, in which hardly anything can be located; set a larger "
                "teacher.input_size, or of your own network an earlier teacher.layer",
                *self.grid,
            )
        if reason := self._describe_guessing(classes):
            logger.warning("%s", reason)

    def _errors(self, classes: Sequence[str]) -> Iterator[str]:
        if (returns := self.returns) == "logits" and self.form != "logits":
            layer = "softmax" if self.form == "probabilities" else "log_softmax"
            yield (
                f"the teacher's outputs are {self.form.replace('_', '-')} and not logits, for all {self.records} "
                f"records of a sample; remove the {layer} at its end, or for your own network and a pass without maps "
                f"set teacher.returns={self.form}"
            )
        if (
            returns != "logits"
            and self.form != "log_probabilities"
            and self.records >= _MIN_RECORDS
        ):
            rows = "rows" if returns == "probabilities" else "exponentials of the rows"
            yield (
                f"teacher.returns={returns}, but the {rows} that the teacher returns do not sum to 1; leave the option "
                "out if they are logits, and remove the sigmoid if they are probabilities of single classes"
            )
        if self.maps >= _MIN_RECORDS and self.constant_maps == self.maps:
            yield (
                f"all {self.maps} maps of a sample are constant on their grid of {'x'.join(map(str, self.grid or ()))} "
                "cells; set a larger teacher.input_size, or of your own network another teacher.layer"
            )
        if self.grid and self.input_size and not has_proportions(self.grid, self.input_size):
            yield (
                f"the teacher's maps have {self.grid[0]}x{self.grid[1]} cells for images of "
                f"{self.input_size[0]}x{self.input_size[1]} pixels, which cannot be their rows and columns; correct "
                "the network's features"
            )
        moved = _other_order(np.array(self.labels), np.array(self.predicted), classes)
        if moved and self.entropy > _UNSURE:  # an untrained network also maps colors to classes
            logger.warning(
                "%s. Or train the teacher first: its outputs are as even as those of an untrained network",
                moved,
            )
        elif moved:
            yield moved

    def _describe_guessing(self, classes: Sequence[str]) -> str:
        """Say that predictions are not better than guessing with the same frequencies, nothing if they are."""
        if (count := len(self.labels)) < _MIN_RECORDS or len(set(self.labels)) == 1:
            return ""
        if len(set(self.predicted)) == 1:
            return (
                f"the teacher predicts {classes[self.predicted[0]]} for all {count} labeled records of a sample; it is "
                "hardly trained, or its inputs are not those of its training (teacher.mean, teacher.std, "
                "teacher.input_size, teacher.frame)"
            )
        correct, chance = correct_and_chance(np.array(self.labels), np.array(self.predicted))
        stated = (
            f"the teacher is right for {correct} of {count} records of a sample, and guessing would be for "
            f"{chance * count:.0f}"
        )
        p_value = float(bdtr(correct, count, chance))  # of a binomial test
        if p_value < SIGNIFICANCE:
            return f"{stated} (p = {p_value:.1g}): look at the labels and the order of the classes"
        if bdtrc(correct - 1, count, chance) > _SIGNIFICANCE_OF_SKILL:
            return f"{stated}: it is hardly trained, or its labels or inputs are not those of its training"
        return ""


def check_teacher(
    executor: Executor, task: CheckTeacher, shards: Sequence[ShardEntry]
) -> TeacherCheck | None:
    """Run the task on the executor.

    Args:
        executor: Executor that runs the task.
        task: Task that looks at a sample.
        shards: Shards of the pass, from which the sample is taken.

    Returns:
        The description of the teacher, None for a pass without records.

    Raises:
        DependentRecordsError: If an output of a record depends on other records.
    """
    fewest, most = CHECKED_RECORDS
    count = sum(shard.records for shard in shards) // _SAMPLE_SHARE
    if not task.config.reads_head:  # only what features depend on is checked
        most = fewest
    sample = select_sample(shards, min(max(count, fewest), most))
    return measure_sample(executor, task, sample, shards) if sample else None


@dataclass(frozen=True, kw_only=True)
class CheckTeacher(SampleTask[TeacherCheck]):
    """Task that runs the teacher on a sample and describes its outputs, and writes nothing."""

    def measure(self, sample: Sample) -> tuple[int, TeacherCheck]:
        annotator = self.build_annotator(precision="float32")
        maps = [kind for kind in annotator.output_kinds if isinstance(kind, MapsOutput)]
        name = f"teacher={self.teacher.name}: {type(annotator.model.network).__name__}"
        logits: list[NDArray[np.float64]] = []
        labels: list[Tensor] = []
        constant, count, grid = 0, 0, None
        batches: list[_ProbedBatch] = []
        for frames, keys in self.iter_batches(sample):
            inputs = annotator.inputs_of(frames)
            output = annotator.run_inputs(inputs)
            batches.append(_ProbedBatch.of(inputs, output))
            logits.append(output.logits.detach().double().cpu().numpy())
            labels.append(frames.labels)
            for kind in maps:
                with np.errstate(invalid="ignore"):  # values that are not finite are refused below
                    stored = kind.encode(annotator.model, output, BatchInfo(keys, frames.labels))
                classes, values = (
                    stored.values[field].cpu().numpy() for field in ("target_class", "map")
                )
                explainer = f"explainer={self.explainer.line}"
                require(
                    np.isfinite(values).all(),
                    f"{explainer} gives maps with values that are not finite; correct its function, or choose another",
                )
                if self.explainer.reads == "images":  # passes of its own, which no other check runs
                    first = BatchInfo(keys[:1], frames.labels[:1])
                    alone = kind.encode(annotator.model, annotator.run_inputs(inputs[:1]), first)
                    map_alone = decode_unit(alone.values["map"].cpu().numpy())
                    require(
                        np.abs(map_alone - decode_unit(values[:1])).max() <= _MAP_ROUNDING,
                        f"{explainer} gives {keys[0]} another map among other records than alone, so students would "
                        "learn their batches; compute each record's map from that record",
                        DependentRecordsError,
                    )
                explained = decode_unit(values[classes >= 0])
                constant += int((np.ptp(explained, axis=(1, 2, 3)) == 0).sum())
                count += len(explained)
                grid = explained.shape[-2:]
        self._require_independence(name, annotator, batches)
        annotator.require_no_memory(name, batches[0].inputs)
        check = TeacherCheck(
            **describe_outputs(
                np.concatenate(logits), torch.cat(labels), count_classes(self.classes)
            ),
            returns=annotator.model.returns,
            maps=count,
            constant_maps=constant,
            grid=grid,
            input_size=annotator.input_size,
        )
        return check.records, check

    def _require_independence(
        self, name: str, annotator: TeacherAnnotator, batches: Sequence[_ProbedBatch]
    ) -> None:
        """Require that records of the largest batch have the same outputs alone and among those of other shards."""

        def run(inputs: Tensor) -> list[Tensor]:
            return outputs_of(annotator.run_inputs(inputs))

        largest = max(batches, key=lambda batch: batch.size)
        others = [batch for batch in batches if batch is not largest][:2] or batches[:1]
        neighbors = torch.cat([batch.inputs[:1] for batch in others])
        require_independent_records(
            name, annotator.model, run, largest.inputs, neighbors, largest.outputs
        )


class _ProbedBatch(NamedTuple):
    """Rows of a batch of a sample, with their outputs within the whole batch."""

    size: int
    """Number of records of the batch."""
    inputs: Tensor
    """The first two rows and the last one."""
    outputs: list[Tensor]

    @classmethod
    def of(cls, inputs: Tensor, output: ModelOutput) -> _ProbedBatch:
        rows = [0, min(1, len(inputs) - 1), len(inputs) - 1]
        return cls(len(inputs), inputs[rows], [tensor[rows] for tensor in outputs_of(output)])


def outputs_of(output: ModelOutput) -> list[Tensor]:
    """Return the tensors of a forward pass that are stored or used to compute stored fields."""
    pooled = [] if output.pooled is None else [output.pooled]
    return [output.logits, output.features, *pooled]


def describe_outputs(
    logits: NDArray[np.float64], labels: Tensor, num_classes: int
) -> dict[str, Any]:
    """Describe outputs of records, as in TeacherCheck.

    Args:
        logits: Raw outputs, f64 [n, K].
        labels: Labels of the records in the form of Batch.
        num_classes: Number of the store's classes; labels are left out if it is not K.

    Returns:
        The values of the fields of TeacherCheck up to `predicted`, without `outputs`.
    """
    with np.errstate(over="ignore"):
        rounded = logits.astype(np.float16).astype(np.float64)
    finite = bool(np.isfinite(rounded).all())
    possible = logits > IMPOSSIBLE_LOGIT
    largest = np.abs(np.where(possible, logits, 0.0)).max(axis=1)
    spacing = np.spacing(np.minimum(largest, 2.0**15).astype(np.float16))
    spread = logits.std(axis=1, where=possible)
    # Equal logits have no differences to lose.
    shares = spacing.astype(np.float64)[spread > 0] / spread[spread > 0]
    are_known = not has_many(labels) and logits.shape[1] == num_classes
    entropy, _ = entropy_and_peak(np.asarray(log_softmax(logits, axis=1)))
    known = (labels != NO_LABEL).numpy() if are_known else np.zeros(len(logits), bool)
    return {
        "records": len(logits),
        "form": _form(logits),
        "warning": ""
        if has_many(labels)
        else describe_spread(entropy, logits.shape[1], 1.0, len(logits)),
        "is_constant": bool(np.ptp(logits, axis=0).max() <= _ROUNDING * largest.max()),
        "is_within_unit": bool((logits >= 0).all() and (logits <= 1).all()),
        "spacing": float(np.median(shares)) if len(shares) else 0.0,
        "rounding_kl": _mean_divergence(logits, rounded) if finite else None,
        "entropy": entropy / np.log(max(logits.shape[1], 2)),
        "labels": labels.numpy()[known].tolist() if are_known else [],
        "predicted": logits.argmax(axis=1)[known].tolist(),
    }


def _form(logits: NDArray[np.float64]) -> str:
    if logits.shape[1] > 1 and len(logits) >= _MIN_RECORDS:
        if (logits >= 0).all() and (np.abs(logits.sum(axis=1) - 1) < _SUM_TOLERANCE).all():
            return "probabilities"
        if (logits <= 0).all():
            with np.errstate(under="ignore"):
                sums = np.exp(logits).sum(axis=1)
            if (np.abs(sums - 1) < _SUM_TOLERANCE).all():
                return "log_probabilities"
    return "logits"


def _mean_divergence(logits: NDArray[np.float64], rounded: NDArray[np.float64]) -> float:
    one, other = (torch.from_numpy(values).log_softmax(dim=1) for values in (logits, rounded))
    return float((one.exp() * (one - other)).sum(dim=1).clamp(min=0).mean())


# ---- what follows from it --------------------------------------------------------------------------


def _other_order(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> str:
    """Describe another class order that fits the labels better, empty if there is none.

    Orders that are tried are that of numbers in the names, those shifted by one, and the best assignment of labels to
    predictions in every other record. The latter is tested on the other records.
    """
    if not len(labels) or np.ptp(predicted) == 0:  # one output fits any order
        return ""
    count = len(classes)
    orders = {
        "the outputs are in the order of the numbers that name the classes": _numeric_order(classes)
    } | {
        f"the outputs are shifted by {shift:+d}": (np.arange(count) + shift) % count
        for shift in (1, -1)
    }
    for reason, order in orders.items():
        if order is not None and _fits_better(labels, predicted, order):
            return _describe_order(reason, labels, predicted, order, classes)
    # Records of a shard may be sorted by class, so halves would have other classes.
    first, second = slice(0, None, 2), slice(1, None, 2)
    # Only classes that occur, as a matrix of all has the square of their number.
    names = np.union1d(labels[first], predicted[first])
    confusion = np.zeros((len(names), len(names)), np.int64)
    pairs = np.searchsorted(names, labels[first]), np.searchsorted(names, predicted[first])
    np.add.at(confusion, pairs, 1)
    from scipy.optimize import linear_sum_assignment  # takes a third of a second to import

    rows, columns = linear_sum_assignment(confusion, maximize=True)
    order = np.arange(count)
    order[names[rows]] = names[columns]
    known = np.isin(labels[second], names[rows])
    if _fits_better(labels[second][known], predicted[second][known], order):
        reason = "the outputs have another order than the classes"
        return _describe_order(reason, labels, predicted, order, classes)
    return ""


def _numeric_order(classes: Sequence[str]) -> NDArray[np.int64] | None:
    """Return the place of each class among the numbers that name them, None if names are not numbers."""
    if not all(name.isascii() and name.isdigit() for name in classes):
        return None
    return np.argsort(sorted(range(len(classes)), key=lambda number: int(classes[number])))


def _fits_better(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], order: NDArray[np.int64]
) -> bool:
    """Return whether output order[label] is right for most records and significantly more often than `label`."""
    before, after = labels == predicted, order[labels] == predicted
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    if 2 * int(after.sum()) <= len(labels) or not gained:
        return False
    return float(bdtrc(gained - 1, gained + lost, 0.5)) < SIGNIFICANCE  # of a sign test


def _describe_order(
    reason: str,
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    order: NDArray[np.int64],
    classes: Sequence[str],
) -> str:
    moved = [label for label in np.unique(labels).tolist() if order[label] != label]
    taken = [
        f"{classes[label]} is taken for output {order[label]} ({classes[order[label]]})"
        for label in moved
    ]
    more = f" (+{len(taken) - _MAX_NAMED} more)" if len(taken) > _MAX_NAMED else ""
    before, after = ((column == predicted).mean() for column in (labels, order[labels]))
    return (
        f"{reason}: class {', '.join(taken[:_MAX_NAMED])}{more}; in a sample of {len(labels)} records "
        f"the teacher is right for {before:.0%}, and would be for {after:.0%}. List the classes in the order of its "
        "outputs (data.classes=, a text file with a class a line) and pack the data again"
    )
