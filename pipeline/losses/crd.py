"""CRD (Tian et al. 2020): contrastive representation distillation against a memory of all records.

Both networks' pooled features are mapped to embeddings of unit length. A record's embedding by one network is told
apart, by noise-contrastive estimation, from what the other network's bank keeps of records of other classes. The
linear maps are trained with the student; maps and banks are left behind with the loss.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.methods import CRDConfig
from pipeline.core.errors import require
from pipeline.core.records import NO_LABEL, Targets
from pipeline.loading.dataset import StoreDataset
from pipeline.losses.base import Needs, StudentOutput
from pipeline.losses.feature_kd import FeatureKDLoss, pooled_fields
from pipeline.models.output import Intermediates

_EPS = 1e-7
_RECORDS_AT_ONCE = 4096
"""Whose features are embedded together when the teacher's bank is filled."""


def contrast_scores(anchors: Tensor, bank: Tensor, chosen: Tensor, tau: float) -> Tensor:
    """exp(<anchor, bank[chosen]> / tau): [B, d], [N, d], i64 [B, 1 + m] -> [B, 1 + m]."""
    kept = bank[chosen]  # [B, 1 + m, d]
    return torch.exp(torch.einsum("bmd,bd->bm", kept, anchors) / tau)


def nce_loss(probabilities: Tensor, num_records: int) -> Tensor:
    """Noise-contrastive estimation (Gutmann & Hyvarinen 2010), averaged over the batch.

    -log(p_0 / (p_0 + m Pn + eps)) - sum_i log(m Pn / (p_i + m Pn + eps)), with Pn = 1 / num_records

    probabilities  [B, 1 + m]: scores divided by their normalizer, the record's own first
    """
    noise = (probabilities.shape[1] - 1) / num_records  # m Pn
    own, others = probabilities[:, :1], probabilities[:, 1:]
    of_own = torch.log(own / (own + noise + _EPS)).sum(dim=1)
    of_others = torch.log(noise / (others + noise + _EPS)).sum(dim=1)
    return -(of_own + of_others).mean()


class Negatives(nn.Module):
    """Draws records of other classes: those of one class stand together, and a draw skips them."""

    order: Tensor
    """i64 [N]: records by class."""
    first: Tensor
    """i64 [N]: where in that order the class of each record begins."""
    size: Tensor
    """i64 [N]: and how many records it has."""

    def __init__(self, labels: Tensor) -> None:
        """labels  i64 [N], of all records"""
        super().__init__()
        _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.fewest = int(len(labels) - counts.max())
        """Records of other classes, of the class that has the fewest."""
        # Not persistent: they follow from the selection of records, which the run's identity covers.
        self.register_buffer("order", classes.argsort(stable=True), persistent=False)
        self.register_buffer("first", starts[classes], persistent=False)
        self.register_buffer("size", counts[classes], persistent=False)

    def draw(self, records: Tensor, count: int) -> Tensor:
        """`count` of them for each of the records i64 [B], uniformly and with replacement: i64 [B, count]."""
        size, first = self.size[records, None], self.first[records, None]
        uniform = torch.rand(
            len(records), count, device=records.device, dtype=torch.float64
        )  # float32 could not name each of 2^24 records
        place = (uniform * (len(self.order) - size)).long()
        return self.order[place + size * (place >= first)]


class CRDLoss(FeatureKDLoss):
    """NCE of the student's embedding against the teacher's bank and the reverse, beside labels and logits."""

    term = "crd"
    term_needs = Needs(
        intermediates=Intermediates(pooled=True), target_fields=pooled_fields, payload="pooled"
    )
    config: CRDConfig
    student_bank: Tensor
    """[N, embedding_size], of unit length."""
    teacher_bank: Tensor
    normalizer: Tensor
    """[2], of the student's and of the teacher's scores: N times their mean in the first step; 0 before it."""

    def __init__(self, config: CRDConfig) -> None:
        super().__init__(config)
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        """Records and both embeddings of the step that is under way."""

    @property
    def weight(self) -> float:
        return self.config.lambda_crd

    def build(self, student: StudentOutput, targets: Targets) -> None:
        assert student.output.pooled is not None
        size = self.config.embedding_size
        self.embed_student = nn.Linear(student.output.pooled.shape[1], size)
        self.embed_teacher = nn.Linear(targets.intermediates["pooled"].shape[1], size)

    def on_train_start(self, dataset: StoreDataset) -> None:
        """Banks: of random directions, but the teacher's of its stored features where there are any."""
        if self.weight == 0:
            return
        labels = dataset.labels_at(np.arange(len(dataset)))
        require(
            not dataset.has_many_labels and bool((labels != NO_LABEL).all()),
            "method=crd tells a record from those of other classes, and not every record of this selection has one "
            "label of the network's classes; choose labeled records, or method.lambda_crd=0",
        )
        require(
            len(dataset.passes) <= 1,
            f"method=crd keeps the embeddings of one teacher, and store.teacher names {len(dataset.passes)}; name one",
        )
        self.negatives = Negatives(labels)
        require(
            self.negatives.fewest > 0,
            "method=crd tells a record from those of other classes, and all of this selection have one; choose more "
            "classes",
        )
        for name in ("student_bank", "teacher_bank"):
            directions = torch.randn(len(labels), self.config.embedding_size)
            self.register_buffer(name, F.normalize(directions, dim=1))
        self.register_buffer("normalizer", torch.zeros(2))
        if dataset.passes:
            self._fill_teacher_bank(dataset)

    @torch.no_grad()
    def _fill_teacher_bank(self, dataset: StoreDataset) -> None:
        for start in range(0, len(dataset), _RECORDS_AT_ONCE):
            at = np.arange(start, min(start + _RECORDS_AT_ONCE, len(dataset)))
            (intermediates,) = dataset.intermediates_at(at)
            self.teacher_bank[at] = _embed(self.embed_teacher, intermediates["pooled"])

    def compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        assert student.output.pooled is not None
        assert student.record_index is not None
        records = student.record_index
        own = _embed(self.embed_student, student.output.pooled)
        taught = _embed(self.embed_teacher, targets.intermediates["pooled"].detach())
        count = min(self.config.negatives, self.negatives.fewest)
        chosen = torch.cat([records[:, None], self.negatives.draw(records, count)], dim=1)
        scores = [
            contrast_scores(own, self.teacher_bank, chosen, self.config.tau_crd),
            contrast_scores(taught, self.student_bank, chosen, self.config.tau_crd),
        ]
        normalizer = self._normalization_of(scores)
        if torch.is_grad_enabled():
            self._seen = (records, own.detach(), taught.detach())
        num_records = len(self.teacher_bank)
        losses = [
            nce_loss(each / z, num_records) for each, z in zip(scores, normalizer, strict=True)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _normalization_of(self, scores: list[Tensor]) -> Tensor:
        """Of the first step that is taken, for good; it is the same on all ranks."""
        mean = torch.stack([each.mean() for each in scores]) * len(self.teacher_bank)
        self._estimate = torch.where(
            self.normalizer > 0, self.normalizer, self.distributed.mean(mean)
        )
        return self._estimate

    @torch.no_grad()
    def on_step_end(self) -> None:
        """Move what the banks keep of the step's records, of all ranks, toward the new embeddings."""
        if self._seen is None:
            return
        records, own, taught = (self.distributed.gather(values) for values in self._seen)
        self._seen = None
        self.normalizer.copy_(self._estimate)
        momentum = self.config.momentum
        for bank, fresh in ((self.student_bank, own), (self.teacher_bank, taught)):
            kept = momentum * bank[records] + (1 - momentum) * fresh
            bank.index_copy_(0, records, F.normalize(kept, dim=1))


def _embed(linear: nn.Linear, pooled: Tensor) -> Tensor:
    """Of unit length, [B, d] -> [B, embedding_size]."""
    return F.normalize(linear(pooled.to(linear.weight)), dim=1)
