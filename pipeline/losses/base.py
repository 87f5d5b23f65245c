"""What a loss is: its needs, its weighted terms, and the callbacks of a training that it may follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.distributed import DistributedContext
from pipeline.core.records import Guidance, Targets
from pipeline.loading.dataset import StoreDataset
from pipeline.models.output import NO_INTERMEDIATES, Intermediates, ModelOutput


@dataclass(frozen=True, kw_only=True)
class StudentOutput:
    """The student's side of a step; gradients flow through all of it."""

    output: ModelOutput
    """The forward pass, with the intermediates that the loss needs."""
    maps: Tensor | None = None
    """[B, E, A, h, w] for the teacher's explained classes, where the loss needs them in this step."""
    input_size: tuple[int, int] = (0, 0)
    """(height, width) of the student's input: the resolution at which maps are compared."""
    record_index: Tensor | None = None
    """i64 [B]: which record of the training's selection each row shows, for losses that remember records."""
    view_index: Tensor | None = None
    """i64 [B]: which stored view of it, -1 for a fresh one."""

    @property
    def logits(self) -> Tensor:
        """[B, K]."""
        return self.output.logits


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a loss reads; nothing else is loaded or computed for it."""

    labels: bool = False
    targets: bool = True
    """False where labels are all that it reads."""
    maps_every: int | None = None
    """The student's and the teacher's maps in every n-th step; None in none."""
    map_control: str = "none"
    """How the teacher's maps are spoilt, for a negative control."""
    intermediates: Intermediates = NO_INTERMEDIATES
    """Of both networks' forward passes."""
    target_fields: Callable[[ModelOutput], dict[str, Tensor]] | None = None
    """The teacher's side of them as `Targets.intermediates` names it, from its forward pass: f32, without a graph."""
    payload: str | None = None
    """The payload that stores these fields."""

    def maps_in(self, step: int) -> bool:
        """Whether maps enter the loss in this step."""
        return self.maps_every is not None and step % self.maps_every == 0


class TermValue(NamedTuple):
    """A term's value, with numbers to log that are no terms, such as the fraction of valid maps."""

    value: Tensor
    statistics: dict[str, Tensor]


class Term(NamedTuple):
    """A part of a loss."""

    name: str
    """ce or bce, kd, map, at, cat, review, ft, crd, ss, tf, ked, hint, localization."""
    weight: float
    compute: Callable[[], Tensor | TermValue]
    """Not called where the weight is 0."""


_ON_LOGITS = {"ce", "bce", "kd"}
"""Terms that reach the whole classifier."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A scalar to minimize and what it is made of, all on the training device."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted terms by name."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Numbers to log that are not terms."""


def weighted_sum(parts: Sequence[LossTerms], weights: Sequence[float]) -> LossTerms:
    """One loss of several teachers: everything is summed with its teacher's weight."""
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]

    def total(values: Sequence[Tensor]) -> Tensor:
        weighted = [weight * value for weight, value in zip(weights, values, strict=True)]
        return torch.stack(weighted).sum()

    return LossTerms(
        total=total([part.total for part in parts]),
        terms={name: total([part.terms[name] for part in parts]) for name in parts[0].terms},
        statistics={
            name: total([part.statistics[name] for part in parts]) for name in parts[0].statistics
        },
    )


@dataclass(frozen=True, kw_only=True)
class AuxiliaryPretraining:
    """Training of a loss's auxiliary modules on the teacher alone, before the student's first step.

    By SGD with momentum 0.9; the modules stand still afterwards.
    """

    parameters: list[nn.Parameter]
    epochs: int
    """0 leaves them as they were drawn."""
    lr: float
    """Divided by 10 after each `decay_every_epochs`."""
    decay_every_epochs: int
    weight_decay: float
    loss: Callable[[Targets, Tensor], Tensor]
    """(targets, view_index i64 [B]) -> a scalar to minimize, whose gradients reach these parameters alone."""


class LossCallbacks:
    """What a training tells a loss; a loss overrides those that it follows."""

    def build(self, student: StudentOutput, targets: Targets) -> None:
        """Create the parameters whose shapes depend on the networks, given one example of `forward`'s arguments.

        Called before training where the loss needs intermediates; ConfigError where the two networks do not fit.
        """

    def on_train_start(self, dataset: StoreDataset) -> None:
        """Create what the loss keeps of each record; called after `build`, always.

        ConfigError where the records do not fit the loss.
        """

    def on_step_end(self) -> None:
        """Follow the optimizer's step; called on every rank."""

    @property
    def pretraining(self) -> AuxiliaryPretraining | None:
        """The training of auxiliary modules that precedes the student's, if any."""
        return None


class DistillationLoss(nn.Module, LossCallbacks):
    """(student, targets, labels) -> LossTerms; its own parameters, if any, train with the student."""

    distributed: DistributedContext = DistributedContext()
    """The processes that train together, set by the training: what a loss keeps of records must be the same on all."""

    @property
    def needs(self) -> Needs:
        """What it reads."""
        return Needs()

    def check_labels(self, *, many: bool) -> None:
        """ConfigError where this loss does not fit a set with one label a record, or with many."""

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        """The terms in the order in which they are computed; labels as of Batch."""
        raise NotImplementedError

    def forward(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> LossTerms:
        """The sum of the terms, each times its weight."""
        terms: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        weighted = []
        for term in self.terms(student, targets, labels):
            if term.weight == 0:
                continue
            found = term.compute()
            if isinstance(found, TermValue):
                statistics |= found.statistics
                found = found.value
            terms[term.name] = found
            weighted.append(term.weight * found)
        if not terms.keys() & _ON_LOGITS:  # ranks wait for a gradient of every parameter
            weighted.append(0 * student.logits.sum())
        return LossTerms(total=torch.stack(weighted).sum(), terms=terms, statistics=statistics)
