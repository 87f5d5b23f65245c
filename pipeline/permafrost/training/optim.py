"""The optimizer, and the schedule of its learning rate: a warm-up, then cosine, step decay or constant."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.errors import require

_WARMUP_START = 0.01


def build_optimizer(
    config: OptimizerOptions, parameters: list[nn.Parameter], *, fused: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer that `optimizer=` names, with the same options for all parameters.

    Args:
        config: Options of the optimizer.
        parameters: Parameters of the network and of the loss.
        fused: Use the fused implementation, which is one launch on a GPU, and skips steps with infinite gradients
            without a GradScaler synchronization.
    """
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=config.momentum),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    # On a CPU torch would update one parameter after the other, which takes longer and has the same bits.
    return kinds[config.kind](
        parameters, config.lr, weight_decay=config.weight_decay, fused=fused, foreach=not fused
    )


def learning_rate(
    config: TrainerOptions, lr: float, epoch: int, step: int = 0, num_steps: int = 1
) -> float:
    """Compute the learning rate of a step.

    It is linear from 0.01 * lr over the warm-up, then according to `trainer.schedule`. It changes once per epoch, or in
    every step if the warm-up is given in steps.

    Args:
        config: Options of the schedule.
        lr: Learning rate at the end of the warm-up.
        epoch: Epoch, counted from 0.
        step: Step within the epoch, counted from 0.
        num_steps: Number of steps per epoch.
    """
    at, warmup, end = (
        (float(epoch), config.warmup_epochs, config.epochs)
        if config.warmup_steps is None
        else (epoch * num_steps + step, config.warmup_steps, config.epochs * num_steps)
    )
    if at < warmup:
        return lr * (_WARMUP_START + (1 - _WARMUP_START) * at / warmup)
    if config.schedule == "constant":
        return lr
    if config.schedule == "decay":
        return lr * config.decay ** (epoch // config.decay_every_epochs)
    return lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (end - warmup)))


def check_warmup(config: TrainerOptions, num_steps: int) -> None:
    """Raise ConfigError if a warm-up in steps does not end before the training does.

    Args:
        config: Options of the schedule.
        num_steps: Number of steps per epoch.
    """
    steps = config.epochs * num_steps
    require(
        config.warmup_steps is None or config.warmup_steps < steps,
        f"trainer.warmup_steps={config.warmup_steps} does not end within the {steps} steps of "
        f"trainer.epochs={config.epochs}; lower it or raise trainer.epochs",
    )
