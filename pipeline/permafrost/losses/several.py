"""Several methods at once (`method=several`), each on a pass of its own: the weighted sum of their losses.

The student has one forward pass. The loss is called once for each pass, as for several teachers of one method, and sums
the terms that read this pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import SeveralConfig, TeacherTermOptions
from permafrost.core.batches import AnyLabels, Targets
from permafrost.core.errors import require
from permafrost.losses.base import (
    DistillationLoss,
    LossTerms,
    Needs,
    StoredTeacher,
    StudentOutput,
    Term,
    TermValue,
    build_loss,
)
from permafrost.models.classifier import Intermediates


class SeveralLoss(DistillationLoss):
    """Loss sum over terms n of weight_n L_n. The metrics of term n have the suffix _n, counted from 1.

    method.balance=uncertainty minimizes sum_n exp(-s_n) weight_n L_n + s_n, where s_n starts at 0 and is trained with
    the student. This is twice the sum of L_n / (2 sigma_n^2) + log sigma_n for s_n = log sigma_n^2 (Kendall et al.
    2018, equation 7, for regression), so that it starts as the fixed sum. The best s_n is log(weight_n L_n).

    method.drop_teachers=p leaves each term out of a step with probability p, except the term of the largest weight_n
    L_n. All ranks leave out the same terms. Parameters that no other term reaches have a gradient of 0 then.
    """

    config: SeveralConfig

    def __init__(self, config: SeveralConfig) -> None:
        super().__init__(config)
        self.losses = nn.ModuleList(build_loss(term.method) for term in config.terms)
        self.weights: dict[str, float] = {}
        """Weight in the sum of each metric that is a term."""
        zeros = torch.zeros(len(config.terms))
        self.log_variances = nn.Parameter(zeros) if config.balance == "uncertainty" else zeros

    def _parts(self) -> Iterator[tuple[TeacherTermOptions, DistillationLoss]]:
        for term, loss in zip(self.config.terms, self.losses, strict=True):
            assert isinstance(loss, DistillationLoss)
            yield term, loss

    @property
    def needs(self) -> Needs:
        """Inputs that any of the terms reads. Those of a pass are `needs_of`."""
        parts = [loss.needs for _, loss in self._parts()]
        intervals = [needs.maps_every for needs in parts if needs.maps_every is not None]
        return Needs(
            labels=any(needs.labels for needs in parts),
            logits=any(needs.logits for needs in parts),
            maps_every=math.gcd(*intervals) if intervals else None,
            scaled_maps=any(needs.scaled_maps for needs in parts),
            explainer=next(iter(self._explainers()), None),
            intermediates=Intermediates(
                *map(any, zip(*(needs.intermediates for needs in parts), strict=True))
            ),
        )

    def _explainers(self) -> set[str | None]:
        """Return the explainers that the terms on maps name, None for that of the teacher's maps."""
        parts = [loss.needs for _, loss in self._parts()]
        return {needs.explainer for needs in parts if needs.maps_every is not None}

    def needs_of(self, teacher: str) -> tuple[Needs, ...]:
        return tuple(loss.needs for term, loss in self._parts() if term.reads(teacher))

    def plan(
        self, config: DistillConfig, passes: Sequence[StoredTeacher], num_classes: int
    ) -> None:
        require(
            len(self._explainers()) <= 1,
            f"method.terms name the explainers {self._explainers()}, but a student has one; name the same in each term",
        )
        for teacher in passes:
            readers = [needs for needs in self.needs_of(teacher.name) if needs.maps_every]
            require(
                len(readers) <= 1,
                f"method.terms has {len(readers)} terms that compare the maps of {teacher.name}; leave one of them",
            )
        for _, loss in self._parts():
            loss.plan(config, passes, num_classes)

    def check_labels(self, *, many: bool) -> None:
        for _, loss in self._parts():
            loss.check_labels(many=many)

    def build(self, student: StudentOutput, targets: Targets) -> None:
        for term, loss in self._parts():
            if term.reads(targets.teacher) and loss.needs.outputs:
                loss.build(student, _select_fields(targets, loss))

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        for number, (term, loss) in enumerate(self._parts(), start=1):
            if term.reads(targets.teacher):
                loss.distributed = self.distributed  # the training sets it after this loss is built
                is_explained = loss.needs.maps_every is not None
                output = student if is_explained else replace(student, maps=None)
                for part in loss.terms(output, _select_fields(targets, loss), labels):
                    numbered = _numbered(part, number, term.weight)
                    self.weights[numbered.name] = numbered.weight
                    yield numbered

    def combine(self, parts: Sequence[LossTerms], weight: float) -> LossTerms:
        summed, config = super().combine(parts, weight), self.config
        if config.balance == "fixed" and config.drop_teachers == 0:
            return summed
        sums: dict[int, Tensor] = {}
        for name, value in summed.terms.items():
            number = int(name.rpartition("_")[2])
            sums[number] = sums.get(number, 0) + self.weights[name] * value
        losses = torch.stack(list(sums.values()))
        log_variances = self.log_variances.to(losses)[[number - 1 for number in sums]]
        drawn = self.distributed.gather(torch.rand_like(losses))[: len(losses)]  # the first rank's
        largest = self.distributed.mean(losses.detach()).argmax()
        kept = (drawn >= config.drop_teachers).index_fill(0, largest, True).to(losses)
        balanced = kept * (torch.exp(-log_variances) * losses + log_variances)
        factors = kept * torch.exp(-log_variances.detach())
        named = {f"balance_{n}": each for n, each in zip(sums, factors, strict=True)}
        # ranks wait for the gradients of all parameters
        total = balanced.sum() + 0 * summed.total
        return replace(summed, total=total, statistics={**summed.statistics, **named})


def _select_fields(targets: Targets, loss: DistillationLoss) -> Targets:
    """Return targets with the intermediates of the loss's outputs alone, converted for it alone."""

    def is_read(name: str) -> bool:
        return any(
            name == output_name or name.startswith(f"{output_name}_")
            for output_name in loss.needs.outputs
        )

    selected = replace(
        targets,
        intermediates={
            name: values for name, values in targets.intermediates.items() if is_read(name)
        },
        coverage={name: values for name, values in targets.coverage.items() if is_read(name)},
        placements={
            name: matrices for name, matrices in targets.placements.items() if is_read(name)
        },
    )
    (converted,) = loss.convert_targets((selected,))
    return converted


def _numbered(part: Term, number: int, factor: float) -> Term:
    """Return a term with its number in all names, and its weight multiplied by a factor."""

    def compute() -> Tensor | TermValue:
        computed = part.compute()
        if isinstance(computed, Tensor):
            return computed
        statistics = {f"{name}_{number}": value for name, value in computed.statistics.items()}
        return TermValue(computed.value, statistics)

    return Term(f"{part.name}_{number}", factor * part.weight, compute)
