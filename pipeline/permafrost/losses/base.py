"""The interface of a loss: its needs, its weighted terms, and the callbacks that it receives during a training.

Not here: weights of terms that change during a training, and losses of more than one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import MethodConfig
from permafrost.config.options import resolve_implementation
from permafrost.config.teaching import LabelTeachingConfig
from permafrost.core.batches import AnyLabels, Batch, Targets
from permafrost.core.distributed import DistributedContext
from permafrost.models.classifier import NO_INTERMEDIATES, Intermediates, ModelOutput


class ProjectedField(Protocol):
    """Affine map from the C channels of a teacher's features to C' components."""

    @property
    def mean(self) -> NDArray[np.float32]:
        """[C]."""

    @property
    def components(self) -> NDArray[np.float32]:
        """Orthonormal rows [C', C]."""


class StoredTeacher(Protocol):
    """Facts that a loss may read of a teacher whose outputs are stored."""

    @property
    def name(self) -> str:
        """Unique name among the teachers of a student."""

    @property
    def views(self) -> Mapping[str, Any]:
        """Views whose outputs are stored, and the way they were drawn."""

    @property
    def projections(self) -> Mapping[str, ProjectedField]:
        """Projection of each field that stores components of the teacher's channels."""


class TrainingRecords(Protocol):
    """Facts that a loss may read of the records of a training."""

    @property
    def passes(self) -> Sequence[StoredTeacher]:
        """Teachers whose outputs are stored, none for a live teacher."""

    @property
    def has_many_labels(self) -> bool:
        """True if a record may have several labels."""

    def __len__(self) -> int: ...

    def labels_at(self, at: NDArray[np.int64], /) -> Tensor:
        """Read the labels of these positions: i64 [n], or f32 [n, K] for many labels."""

    def intermediates_at(self, at: NDArray[np.int64], /) -> list[dict[str, Tensor]]:
        """Read the intermediates of every teacher for these positions, f32."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Inputs of one training step. Transforms return modified copies."""

    images: Tensor
    """Images f32 [B, 3, h, w], or rows of a table."""
    labels: AnyLabels
    """Labels in the form of Batch, of both records for mixtures."""
    on_targets: tuple[Callable[[Targets], Targets], ...] = ()
    """Functions applied to each teacher's targets in this order."""

    def change_targets(self, targets: Targets) -> Targets:
        """Return a teacher's targets, changed as the images were."""
        for change in self.on_targets:
            targets = change(targets)
        return targets


class BatchTransform(Protocol):
    """A change to the records of a step, with random draws from torch's global generator."""

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        """Return the changed inputs. `batch` is the batch as loaded."""


@dataclass(frozen=True, kw_only=True)
class StudentOutput:
    """Outputs of the student in a step. Gradients flow through all of them."""

    output: ModelOutput
    """Output of the forward pass, with the intermediates that the loss needs."""
    maps: Tensor | None = None
    """Maps [B, E, A, h, w] of the teacher's target classes, if the loss needs them in this step."""
    input_size: tuple[int, int] = (0, 0)
    """(height, width) of the student's input, the resolution at which maps are compared."""
    record_index: Tensor | None = None
    """Record of each row in the training's selection, i64 [B], for losses that keep state per record."""
    view_index: Tensor | None = None
    """Stored view of each row, i64 [B], or -1 for a newly drawn one."""

    @property
    def logits(self) -> Tensor:
        """Logits [B, K]."""
        return self.output.logits


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Inputs that a loss reads. Nothing else is loaded or computed for it."""

    labels: bool = False
    targets: bool = True
    """False if it reads only labels."""
    logits: bool = True
    """False if it does not read the teacher's logits, which a pass need not have then."""
    maps_every: int | None = None
    """Interval in steps at which the student's and the teacher's maps are needed, None for never."""
    map_control: str = "none"
    """Perturbation of the teacher's maps for a negative control."""
    scaled_maps: bool = False
    """True if it compares the size of maps, too, which are then not relative to their maximum."""
    explainer: str | None = None
    """Explainer of the student's maps, None for that of the teacher's."""
    second_maps: bool = True
    """False to leave out the maps of the second record of a mixture, whose targets are stored."""
    max_classes: int | None = None
    """Maximum number of target classes whose maps are compared, None for all of them."""
    intermediates: Intermediates = NO_INTERMEDIATES
    """Intermediates of both networks' forward passes."""
    target_fields: Callable[[ModelOutput], dict[str, Tensor]] | None = None
    """Function from a live teacher's output to the fields of `Targets.intermediates`, f32 and without a graph; None for
    the fields that its outputs would store."""
    outputs: tuple[str, ...] = ()
    """Outputs that store the fields of `Targets.intermediates`."""

    @property
    def reads_head(self) -> bool:
        """True if it reads what a teacher's last layer makes: logits, or maps of its classes."""
        return self.logits or self.maps_every is not None

    def maps_in(self, step: int) -> bool:
        """Return whether maps are needed in this step."""
        return self.maps_every is not None and step % self.maps_every == 0


class TermValue(NamedTuple):
    """Value of a term, with additional numbers to log, such as the fraction of valid maps."""

    value: Tensor
    statistics: dict[str, Tensor]


class Term(NamedTuple):
    """A weighted term of a loss."""

    name: str
    """Name of the term in the metrics, such as ce, kd or map."""
    weight: float
    compute: Callable[[], Tensor | TermValue]
    """Function that computes the value, not called if the weight is 0."""


_ON_LOGITS = {"ce", "bce", "kd"}
"""Terms whose gradients reach every parameter of the classifier."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A scalar to minimize and its terms, all on the training device."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted terms by name."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Additional numbers to log."""


def weighted_sum(parts: Sequence[LossTerms], weight: float) -> LossTerms:
    """Combine the losses of several teachers, summing all values with a weight.

    A term that only some of them have is summed over these.

    Args:
        parts: Losses, one for each teacher.
        weight: Weight of each of them.
    """
    if len(parts) == 1:
        return parts[0]

    def total(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([weight * each[name] for each in values if name in each]).sum()
            for name in dict.fromkeys(name for mapping in values for name in mapping)
        }

    return LossTerms(
        total=total([{"total": part.total} for part in parts])["total"],
        terms=total([part.terms for part in parts]),
        statistics=total([part.statistics for part in parts]),
    )


class TeacherBatches(Protocol):
    """Batches of a training with the teacher's targets, for parts of a loss that are trained before the student."""

    def epoch(self, number: int) -> Iterator[tuple[Targets, Tensor]]:
        """Iterate over the targets and the stored views, i64 [B], of the batches of an epoch of the student.

        Torch's generators are seeded for each batch.
        """


class LossCallbacks:
    """Callbacks of a training, which a loss overrides as needed."""

    keeps_records: ClassVar[bool] = False
    """True if it keeps state per record of the training, so that its terms have no value on other records."""
    transforms: tuple[BatchTransform, ...] = ()
    """Changes to the records of each step, applied in this order before the forward pass."""

    def plan(
        self, config: DistillConfig, passes: Sequence[StoredTeacher], num_classes: int
    ) -> None:
        """Read what the loss needs of a student's options and passes, before all other calls.

        Args:
            config: Options of the student.
            passes: Teachers whose outputs are stored, none for a live teacher.
            num_classes: Number K of outputs of the student.

        Raises:
            ConfigError: If student and teachers do not fit.
        """

    def convert_targets(self, targets: tuple[Targets, ...]) -> tuple[Targets, ...]:
        """Convert the targets of all teachers before each step, and before `build`."""
        return targets

    def build(self, student: StudentOutput, targets: Targets) -> None:
        """Create the parameters whose shapes depend on the networks, given one example of `forward`'s arguments.

        Called before training if the loss needs intermediates or fields of the teacher.

        Raises:
            ConfigError: If the two networks do not fit.
        """

    def on_train_start(self, records: TrainingRecords) -> None:
        """Create the state that the loss keeps per record. Always called, after `build`.

        Raises:
            ConfigError: If the records do not fit the loss.
        """

    def on_step_end(self) -> None:
        """Update state after the optimizer's step. Called on every rank."""

    def before_first_step(self, batches: TeacherBatches) -> bool:
        """Train parts of the loss on the teacher alone, and return whether anything was trained.

        Called on every rank after `on_train_start`, but not if a checkpoint exists, which has the result. A run that
        is killed here starts again. `distributed` averages gradients over ranks.

        Args:
            batches: Batches of the training, epoch by epoch, with the teacher's targets.
        """
        return False


class DistillationLoss(nn.Module, LossCallbacks):
    """Loss (student, targets, labels) -> LossTerms, whose parameters, if any, are trained with the student."""

    distributed: DistributedContext = DistributedContext()
    """Processes that train together, set by the training. State per record must be the same on all of them."""

    def __init__(self, config: Any = None) -> None:
        """Keep the options of the method as `config`."""
        super().__init__()
        self.config = config

    @property
    def needs(self) -> Needs:
        """Inputs that the loss reads."""
        return Needs()

    def needs_of(self, teacher: str) -> tuple[Needs, ...]:
        """Inputs that the loss reads of one pass, an entry for each of its terms that reads the pass."""
        return (self.needs,)

    def outputs_of(self, teacher: str) -> tuple[str, ...]:
        """Outputs that the loss reads of one pass besides logits and maps."""
        return tuple(
            dict.fromkeys(name for need in self.needs_of(teacher) for name in need.outputs)
        )

    def check_labels(self, *, many: bool) -> None:
        """Raise ConfigError if this loss does not support one label per record, or many if `many`."""

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        """Return the terms in the order of their computation.

        Args:
            student: Outputs of the student, through which gradients flow.
            targets: Targets of one teacher, or regions of a guided teacher; NO_TARGETS for a loss on labels only.
            labels: Labels in the form of Batch: i64 [B], or f32 [B, K] for many labels per record; those of both
                records for mixtures.
        """
        raise NotImplementedError

    def forward(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> LossTerms:
        """Compute the weighted sum of the terms, whose arguments are those of `terms`.

        A term with weight 0 is not computed.
        """
        terms: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        weighted = []
        for term in self.terms(student, targets, labels):
            if term.weight == 0:
                continue
            value = term.compute()
            if isinstance(value, TermValue):
                statistics |= value.statistics
                value = value.value
            terms[term.name] = value
            weighted.append(term.weight * value)
        if not terms.keys() & _ON_LOGITS:  # ranks wait for the gradients of all parameters
            weighted.append(0 * student.logits.sum())
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms, statistics=statistics)

    def combine(self, parts: Sequence[LossTerms], weight: float) -> LossTerms:
        """Combine the losses of a step's teachers, as `weighted_sum` does unless a loss balances them."""
        return weighted_sum(parts, weight)


# ---- build -----------------------------------------------------------------------------------------


def build_loss(config: MethodConfig | LabelTeachingConfig) -> DistillationLoss:
    """Build the loss of a student (`method=`) or of a teacher (`teaching=`)."""
    loss: DistillationLoss = resolve_implementation(type(config))(config)
    return loss
