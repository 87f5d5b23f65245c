"""Pretraining of a loss's auxiliary modules, such as a paraphraser or a head, on the teacher alone.

It reads the batches of the student's first epochs, uses a separate optimizer, and stores the result in the first
checkpoint. A run that is killed in this phase starts it again with the same result. A run that resumes from a
checkpoint skips it.
"""

from __future__ import annotations

import logging

import torch

from permafrost.core.records import Targets
from permafrost.core.seeds import derive_seed
from permafrost.loading.loader import TrainLoader
from permafrost.losses.base import AuxiliaryPretraining
from permafrost.training.state import Training

logger = logging.getLogger("permafrost.training")

_MOMENTUM = 0.9
_DECAY = 0.1


def pretrain_loss(training: Training, stream: TrainLoader) -> None:
    """Train the parameters of the loss's `pretraining`, on all ranks together."""
    phase = training.loss.pretraining
    assert phase is not None
    optimizer = torch.optim.SGD(
        phase.parameters, phase.lr, momentum=_MOMENTUM, weight_decay=phase.weight_decay
    )
    for epoch in range(phase.epochs):
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * _DECAY ** (epoch // phase.decay_every_epochs)
        value = _train_epoch(training, stream, phase, optimizer, epoch)
        if training.distributed.is_first:
            logger.info(
                "pretraining of the loss, epoch %d/%d: %.4f", epoch + 1, phase.epochs, value
            )
    for parameter in phase.parameters:
        parameter.grad = None


def _train_epoch(
    training: Training,
    stream: TrainLoader,
    phase: AuxiliaryPretraining,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> float:
    """Train for one epoch, and return the mean of the term over its steps."""
    device = phase.parameters[0].device
    values = []
    for step, batch in enumerate(stream.epoch(epoch, device=device)):
        torch.manual_seed(
            derive_seed(training.seed, "teacher phase", epoch, step, training.distributed.rank)
        )
        (targets,) = training.targets(batch, (1, 1), with_maps=False)
        assert isinstance(targets, Targets)
        term = phase.loss(targets, batch.view_index)
        optimizer.zero_grad()
        term.backward()  # type: ignore[no-untyped-call]
        training.distributed.average_gradients(phase.parameters)
        optimizer.step()
        values.append(term.detach())
    return float(torch.stack(values).mean())
