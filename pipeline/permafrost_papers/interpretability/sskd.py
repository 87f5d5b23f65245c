"""SSKD (Xu et al. 2020): knowledge distillation with an additional self-supervised task.

A batch contains each record four times, rotated by 0, 90, 180 and 270 degrees. The task is to match a rotated record
with its upright one, by the cosines of their embeddings from a small head on the pooled features. The teacher's head
is trained on the teacher's features before the student's first step. The student's head is trained with the student.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.batches import AnyLabels, Targets, require_all_logits
from permafrost.core.errors import require
from permafrost.losses.base import Needs, StudentOutput, Term, TrainingRecords
from permafrost.models.classifier import Intermediates
from permafrost_papers.interpretability.options import NUM_ROTATIONS, SSKDConfig
from permafrost_papers.interpretability.pretraining import AuxiliaryPretraining, PretrainedLoss

_WEIGHT_DECAY = 5e-4
_TURNS = NUM_ROTATIONS - 1


def views_in_order(values: Tensor, view_index: Tensor) -> Tensor:
    """Reorder rows by record and rotation.

    Args:
        values: [4 R, ...], with four consecutive rows per record in any order.
        view_index: i64 [4 R], the rotation of each row.

    Returns:
        [R, 4, ...], upright first.
    """
    order = view_index.view(-1, NUM_ROTATIONS).argsort(dim=1)
    by_record = values.view(len(order), NUM_ROTATIONS, *values.shape[1:])
    return by_record[torch.arange(len(order), device=order.device)[:, None], order]


def rotated_similarities(embeddings: Tensor) -> Tensor:
    """Compute A_jk = cos(rotated j, upright k): [R, 4, d] -> [3 R, R], where row j belongs to record j // 3."""
    unit = F.normalize(embeddings, dim=2)
    return unit[:, 1:].flatten(0, 1) @ unit[:, 0].T


def kept_rows(scores: Tensor, true: Tensor, keep_wrong: float) -> Tensor:
    """Select the rows of the teacher's scores to train on, bool [n].

    Selected are all rows whose `true` column has the highest score, and the fraction `keep_wrong` of the others,
    ordered by the rank of the true column.

    Args:
        scores: [n, K].
        true: i64 [n]. A row with an unknown column (-1) is ranked last.
        keep_wrong: Fraction in [0, 1].
    """
    true_scores = scores.gather(1, true.clamp(min=0)[:, None])
    rank = torch.where(true < 0, scores.shape[1], (scores > true_scores).sum(dim=1))
    wrong = (rank > 0).sum()
    allowed = len(rank) - wrong + (keep_wrong * wrong).floor()
    return rank.argsort(stable=True).argsort() < allowed


def kept_kd_loss(student: Tensor, teacher: Tensor, tau: float, mask: Tensor) -> Tensor:
    """Compute tau^2 * KL(teacher || student), averaged over the rows of the mask, 0 if there are none.

    Args:
        student: [n, K]. Gradients flow here.
        teacher: [n, K], constant.
        tau: Temperature > 0.
        mask: Bool [n].
    """
    log_student, log_teacher = (
        F.log_softmax(scores / tau, dim=1) for scores in (student, teacher.detach())
    )
    rows = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return tau**2 * torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)


class SSKDLoss(PretrainedLoss):
    """Loss lambda_ce * ce + lambda_kd * kd of upright images + lambda_ss * ss + lambda_tf * tf of rotated ones."""

    term = "ss"
    term_needs = Needs(intermediates=Intermediates(pooled=True), outputs=("pooled",))
    config: SSKDConfig

    @property
    def reads_labels(self) -> bool:
        ranks_turned = self.config.lambda_tf > 0 and self.config.keep_wrong_tf < 1
        return self.config.lambda_ce > 0 or ranks_turned

    def check_labels(self, *, many: bool) -> None:
        require(
            not many,
            "method=sskd compares distributions over all classes, but records of this store have many labels; set "
            "method=kd method.logits=mld",
        )

    def build(self, student: StudentOutput, targets: Targets) -> None:
        self.student_head = _head(student.output.require("pooled").shape[1])
        self.teacher_head = _head(targets.intermediates["pooled"].shape[1])

    def on_train_start(self, records: TrainingRecords) -> None:
        """Raise ConfigError unless there is exactly one pass, with rotations, or a live teacher."""
        if not records.passes:
            return
        require(
            len(records.passes) == 1,
            f"method=sskd supports one teacher, but store.teacher names {len(records.passes)}; name one",
        )
        require(
            (sampler := records.passes[0].views["sampler"]) == "rotations",
            f"{records.passes[0].name} has views={sampler}, but method=sskd needs the four rotations; run "
            "permafrost precompute with views=rotations annotate.outputs=[logits,pooled] and name its pass with "
            "store.teacher=, or run the teacher in the loop with mode=live",
        )

    @property
    def pretraining(self) -> AuxiliaryPretraining:
        return AuxiliaryPretraining(
            parameters=list(self.teacher_head.parameters()),
            epochs=self.config.head_epochs,
            lr=self.config.head_lr,
            decay_every_epochs=max(1, self.config.head_epochs // 3),
            weight_decay=_WEIGHT_DECAY,
            loss=self._task_loss,
        )

    def _task_loss(self, targets: Targets, view_index: Tensor) -> Tensor:
        """Cross-entropy of the teacher's similarities to the true record of each rotated image."""
        similarities = self._similarities(
            self.teacher_head, targets.intermediates["pooled"], view_index
        )
        return F.cross_entropy(similarities, _records_of_turns(similarities))

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        assert isinstance(labels, Tensor)
        assert student.view_index is not None
        config, index = self.config, student.view_index
        logits = require_all_logits(targets.logits, "method=sskd")
        student_logits, teacher_logits, known = (
            views_in_order(values, index) for values in (student.logits, logits, labels)
        )
        yield from self.logit_terms(student_logits[:, 0], teacher_logits[:, 0], known[:, 0])
        yield Term("ss", config.lambda_ss, lambda: self.compare(student, targets))
        yield Term(
            "tf", config.lambda_tf, lambda: self._rotated_kd(student_logits, teacher_logits, known)
        )

    def _rotated_kd(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Soft-target loss of rotated images, from logits [R, 4, K] and labels [R, 4]."""
        student_logits, teacher_logits = student[:, 1:].flatten(0, 1), teacher[:, 1:].flatten(0, 1)
        kept = kept_rows(teacher_logits, labels[:, 1:].flatten(), self.config.keep_wrong_tf)
        return kept_kd_loss(student_logits, teacher_logits, self.config.tau, kept)

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        """Compute the term on similarities."""
        assert student.view_index is not None
        student_similarities = self._similarities(
            self.student_head, student.output.require("pooled"), student.view_index
        )
        with torch.no_grad():
            teacher_similarities = self._similarities(
                self.teacher_head, targets.intermediates["pooled"], student.view_index
            )
        kept = kept_rows(
            teacher_similarities, _records_of_turns(teacher_similarities), self.config.keep_wrong_ss
        )
        return kept_kd_loss(student_similarities, teacher_similarities, self.config.tau_ss, kept)

    def _similarities(self, head: nn.Module, pooled: Tensor, view_index: Tensor) -> Tensor:
        """Compute similarities [3 R, R] of pooled features [4 R, d]."""
        return rotated_similarities(views_in_order(head(pooled), view_index))


def _head(size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


def _records_of_turns(similarities: Tensor) -> Tensor:
    """Record of each row of [3 R, R]: i64 [3 R]."""
    return torch.arange(similarities.shape[1], device=similarities.device).repeat_interleave(_TURNS)
