"""Training of a loss's auxiliary modules on the teacher alone, before the student's first step (FT, SSKD)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permafrost.core.batches import Targets
from permafrost.core.distributed import DistributedContext
from permafrost.losses.base import TeacherBatches
from permafrost.losses.feature_kd import FeatureKDLoss

logger = logging.getLogger("permafrost.training")

_MOMENTUM = 0.9
_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class AuxiliaryPretraining:
    """Parameters to train by SGD with momentum 0.9, and how. They are not updated afterwards."""

    parameters: list[nn.Parameter]
    epochs: int
    """Number of epochs, 0 to leave the parameters at their initial values."""
    lr: float
    """Learning rate, divided by 10 after each `decay_every_epochs`."""
    decay_every_epochs: int
    weight_decay: float
    loss: Callable[[Targets, Tensor], Tensor]
    """(targets, view_index i64 [B]) -> a scalar to minimize, whose gradients reach only these parameters."""

    def run(self, batches: TeacherBatches, distributed: DistributedContext) -> None:
        """Train the parameters, on all ranks together.

        Args:
            batches: Batches of the training with the teacher's targets.
            distributed: Ranks, over which gradients are averaged.
        """
        optimizer = torch.optim.SGD(
            self.parameters, self.lr, momentum=_MOMENTUM, weight_decay=self.weight_decay
        )
        for epoch in range(self.epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * _DECAY ** (epoch // self.decay_every_epochs)
            values = []
            for targets, view_index in batches.epoch(epoch):
                term = self.loss(targets, view_index)
                optimizer.zero_grad()
                term.backward()  # type: ignore[no-untyped-call]
                distributed.average_gradients(self.parameters)
                optimizer.step()
                values.append(term.detach())
            if distributed.is_first:
                logger.info(
                    "pretraining of the loss, epoch %d/%d: %.4f",
                    epoch + 1,
                    self.epochs,
                    torch.stack(values).mean(),
                )
        for parameter in self.parameters:
            parameter.grad = None


class PretrainedLoss(FeatureKDLoss):
    """Base of losses with auxiliary modules that are trained before the student, unless nothing reads them."""

    @property
    @abstractmethod
    def pretraining(self) -> AuxiliaryPretraining:
        """Training of the auxiliary modules."""

    def before_first_step(self, batches: TeacherBatches) -> bool:
        if self.weight > 0:
            self.pretraining.run(batches, self.distributed)
        return self.weight > 0
