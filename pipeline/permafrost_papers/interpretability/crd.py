"""CRD (Tian et al. 2020): contrastive representation distillation against a memory of all records.

The pooled features of both networks are mapped to unit-norm embeddings. Noise-contrastive estimation discriminates a
record's embedding by one network from the embeddings of records of other classes in the other network's bank. The
linear maps are trained with the student. Maps and banks are not exported.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.batches import Targets
from permafrost.core.errors import require
from permafrost.core.records import NO_LABEL
from permafrost.losses.base import Needs, StudentOutput, TrainingRecords
from permafrost.losses.feature_kd import FeatureKDLoss
from permafrost.models.classifier import Intermediates
from permafrost_papers.interpretability.options import CRDConfig

_EPS = 1e-7
_RECORDS_AT_ONCE = 4096
"""Number of records whose features are embedded together when the teacher's bank is filled."""


def contrast_scores(anchors: Tensor, bank: Tensor, indices: Tensor, tau: float) -> Tensor:
    """Compute exp(<anchor, bank[chosen]> / tau).

    Args:
        anchors: Unit-norm embeddings, [B, d].
        bank: Unit-norm embeddings of all records, [N, d].
        indices: Chosen records, i64 [B, 1 + m].
        tau: Temperature > 0.

    Returns:
        [B, 1 + m].
    """
    return torch.exp(torch.einsum("bmd,bd->bm", bank[indices], anchors) / tau)


def nce_loss(probabilities: Tensor, num_records: int) -> Tensor:
    """Compute the loss of noise-contrastive estimation (Gutmann & Hyvarinen 2010), averaged over the batch.

    -log(p_0 / (p_0 + m Pn + eps)) - sum_i log(m Pn / (p_i + m Pn + eps)), with Pn = 1 / num_records

    Args:
        probabilities: [B, 1 + m], scores divided by their normalizer, the record's own score first.
        num_records: Number of records of the bank.
    """
    noise = (probabilities.shape[1] - 1) / num_records  # m Pn
    positive, others = probabilities[:, :1], probabilities[:, 1:]
    of_own = torch.log(positive / (positive + noise + _EPS)).sum(dim=1)
    of_others = torch.log(noise / (others + noise + _EPS)).sum(dim=1)
    return -(of_own + of_others).mean()


class Negatives(nn.Module):
    """Sampler of records of other classes. Records are ordered by class, and a draw skips the record's own class."""

    order: Tensor
    """Records ordered by class, i64 [N]."""
    first: Tensor
    """Start of each record's class in that order, i64 [N]."""
    size: Tensor
    """Number of records of each record's class, i64 [N]."""

    def __init__(self, labels: Tensor) -> None:
        """Index the records by class.

        Args:
            labels: i64 [N], of all records.
        """
        super().__init__()
        _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.fewest = int(len(labels) - counts.max())
        """Minimum over classes of the number of records of other classes."""
        # Not persistent, because they follow from the selection of records, which is part of the run's identity.
        self.register_buffer("order", classes.argsort(stable=True), persistent=False)
        self.register_buffer("first", starts[classes], persistent=False)
        self.register_buffer("size", counts[classes], persistent=False)

    def draw(self, records: Tensor, count: int) -> Tensor:
        """Draw `count` negatives for each record, uniformly with replacement.

        Args:
            records: i64 [B].
            count: Number of negatives per record.

        Returns:
            i64 [B, count].
        """
        size, first = self.size[records, None], self.first[records, None]
        uniform = torch.rand(
            len(records), count, device=records.device, dtype=torch.float64
        )  # float32 cannot represent each of 2^24 or more records
        place = (uniform * (len(self.order) - size)).long()
        return self.order[place + size * (place >= first)]


class CRDLoss(FeatureKDLoss):
    """NCE of the student's embedding against the teacher's bank and the reverse, in addition to labels and logits."""

    keeps_records = True
    term = "crd"
    term_needs = Needs(intermediates=Intermediates(pooled=True), outputs=("pooled",))
    config: CRDConfig
    student_bank: Tensor
    """Unit-norm embeddings [N, embedding_size]."""
    teacher_bank: Tensor
    normalizer: Tensor
    """Normalizers [2] of the student's and the teacher's scores: N times their mean in the first step, 0 before it."""

    def __init__(self, config: CRDConfig) -> None:
        super().__init__(config)
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        """Records and both embeddings of the current step."""

    def build(self, student: StudentOutput, targets: Targets) -> None:
        size = self.config.embedding_size
        self.embed_student = nn.Linear(student.output.require("pooled").shape[1], size)
        self.embed_teacher = nn.Linear(targets.intermediates["pooled"].shape[1], size)

    def on_train_start(self, records: TrainingRecords) -> None:
        """Initialize the banks with random directions, or the teacher's with its stored features if there are any.

        Raises:
            ConfigError: If a record does not have one label, all records have the same class, or there are several
                teachers.
        """
        if self.weight == 0:
            return
        labels = records.labels_at(np.arange(len(records)))
        require(
            not records.has_many_labels and bool((labels != NO_LABEL).all()),
            "method=crd contrasts a record with those of other classes, but not every record of this selection has one "
            "label among the network's classes; choose labeled records or set method.lambda_crd=0",
        )
        self.require_one_teacher(records)
        self.negatives = Negatives(labels)
        require(
            self.negatives.fewest > 0,
            "method=crd contrasts a record with those of other classes, but all records of this selection have the "
            "same class; choose records of more classes",
        )
        for name in ("student_bank", "teacher_bank"):
            directions = torch.randn(len(labels), self.config.embedding_size)
            self.register_buffer(name, F.normalize(directions, dim=1))
        self.register_buffer("normalizer", torch.zeros(2))
        if records.passes:
            self._fill_teacher_bank(records)

    @torch.no_grad()
    def _fill_teacher_bank(self, records: TrainingRecords) -> None:
        for start in range(0, len(records), _RECORDS_AT_ONCE):
            at = np.arange(start, min(start + _RECORDS_AT_ONCE, len(records)))
            (intermediates,) = records.intermediates_at(at)
            self.teacher_bank[at] = _embed(self.embed_teacher, intermediates["pooled"])

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        assert student.record_index is not None
        records = student.record_index
        student_embeddings = _embed(self.embed_student, student.output.require("pooled"))
        teacher_embeddings = _embed(self.embed_teacher, targets.intermediates["pooled"].detach())
        count = min(self.config.negatives, self.negatives.fewest)
        chosen = torch.cat([records[:, None], self.negatives.draw(records, count)], dim=1)
        scores = [
            contrast_scores(student_embeddings, self.teacher_bank, chosen, self.config.tau_crd),
            contrast_scores(teacher_embeddings, self.student_bank, chosen, self.config.tau_crd),
        ]
        normalizer = self._normalization_of(scores)
        if torch.is_grad_enabled():
            self._seen = (records, student_embeddings.detach(), teacher_embeddings.detach())
        losses = [
            nce_loss(each / constant, len(self.teacher_bank))
            for each, constant in zip(scores, normalizer, strict=True)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _normalization_of(self, scores: list[Tensor]) -> Tensor:
        """Normalizers of the first training step, which are kept and are the same on all ranks."""
        mean = torch.stack([class_scores.mean() for class_scores in scores]) * len(
            self.teacher_bank
        )
        self._estimate = torch.where(
            self.normalizer > 0, self.normalizer, self.distributed.mean(mean)
        )
        return self._estimate

    @torch.no_grad()
    def on_step_end(self) -> None:
        """Update the banks' entries for the step's records, of all ranks, with momentum."""
        if self._seen is None:
            return
        records, student_embeddings, teacher_embeddings = (
            self.distributed.gather(values) for values in self._seen
        )
        self._seen = None
        self.normalizer.copy_(self._estimate)
        momentum = self.config.momentum
        for bank, fresh in (
            (self.student_bank, student_embeddings),
            (self.teacher_bank, teacher_embeddings),
        ):
            kept = momentum * bank[records] + (1 - momentum) * fresh
            bank.index_copy_(0, records, F.normalize(kept, dim=1))


def _embed(linear: nn.Linear, pooled: Tensor) -> Tensor:
    """Compute unit-norm embeddings, [B, d] -> [B, embedding_size]."""
    return F.normalize(linear(pooled.to(linear.weight)), dim=1)
