"""One step, one epoch, checkpoints: the same loop for teachers and students."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pipeline.config import ConfigError
from pipeline.explainers import DEFAULT_EXPLAINER, EXPLAINERS, Explainer
from pipeline.geometry import view_images, view_targets
from pipeline.losses.terms import StudentOutput, weighted_sum
from pipeline.metric_log import MetricWriter, StepLog
from pipeline.store.files import write_atomically
from pipeline.stream import move_batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.config import OptimizerConfig, TrainerConfig
    from pipeline.losses.terms import DistillationLoss, LossTerms
    from pipeline.models.output import ModelOutput
    from pipeline.records import Batch
    from pipeline.stream import TrainingStream

CHECKPOINT_NAME = "checkpoint.pt"


# ---- parts ---------------------------------------------------------------------------------------


def resolve_device(option: str, name: str) -> torch.device:
    """The device that an option names; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{option}={name} cannot be used here: {error}") from error
    return device


def build_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser that `optimizer=` names, over all parameters alike."""
    if config.kind == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    if config.kind == "adam":
        return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainerConfig, lr: float, epoch: int) -> float:
    """The rate of an epoch: linear from 0.01 * lr over the warm-up, then a cosine that ends at 0."""
    if epoch < config.warmup_epochs:
        return lr * (0.01 + 0.99 * epoch / config.warmup_epochs)
    if config.schedule == "constant":
        return lr
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(kw_only=True)
class Training:
    """A model that learns, and where it is; what changes is in its checkpoints."""

    model: nn.Module
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer
    explain: Explainer = EXPLAINERS[DEFAULT_EXPLAINER]
    """The teacher's own, so that equal maps mean equal explanations; not in a checkpoint."""
    teacher_weights: tuple[float, ...] = ()
    """Of each teacher's loss, summing to 1; empty weighs all alike."""
    epoch: int = 0
    step: int = 0
    """Of the epoch: the next one to take."""
    global_step: int = 0

    def state(self) -> dict[str, Any]:
        """For `load_state`: tensors and plain values, the live ones; save or copy it before training on."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "position": [self.epoch, self.step, self.global_step],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.epoch, self.step, self.global_step = state["position"]


# ---- one step ------------------------------------------------------------------------------------


def train_step(
    training: Training, batch: Batch, input_size: tuple[int, int], clip_norm: float | None
) -> LossTerms:
    """One optimiser step on a batch that lies on the model's device; nothing waits for the device.

    The teacher's maps are warped to the student's own grid, so the forward pass comes first.
    """
    training.model.train()
    terms = batch_loss(training, batch, input_size)
    training.optimizer.zero_grad()
    terms.total.backward()  # type: ignore[no-untyped-call]
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(_parameters(training), clip_norm)
    training.optimizer.step()
    return terms


def batch_loss(training: Training, batch: Batch, input_size: tuple[int, int]) -> LossTerms:
    """The loss of a batch under its views, with the graph to the student's parameters."""
    loss = training.loss
    output: ModelOutput = training.model(view_images(batch, input_size))
    if not loss.needs_targets:
        return cast("LossTerms", loss(StudentOutput(logits=output.logits), None, batch.labels))
    grid = (output.features.shape[-2], output.features.shape[-1])
    needs_maps = loss.needs_maps(training.global_step)
    teachers = view_targets(batch, grid, loss.map_control, with_maps=needs_maps)
    terms = []
    for targets in teachers:
        maps = None
        if needs_maps:
            assert targets.explained_class is not None
            maps = training.explain(training.model, output, targets.explained_class)
        student = StudentOutput(logits=output.logits, maps=maps, input_size=input_size)
        terms.append(cast("LossTerms", loss(student, targets, batch.labels)))
    return weighted_sum(terms, training.teacher_weights or [1 / len(terms)] * len(terms))


def _parameters(training: Training) -> list[nn.Parameter]:
    return [*training.model.parameters(), *training.loss.parameters()]


# ---- epochs --------------------------------------------------------------------------------------


def fit(
    training: Training,
    stream: TrainingStream,
    *,
    trainer: TrainerConfig,
    lr: float,
    input_size: tuple[int, int],
    folder: Path,
    on_epoch: Callable[[int, str], None],
) -> None:
    """Train to the last epoch, from the folder's checkpoint where there is one.

    Writes checkpoint.pt, metrics.jsonl and TensorBoard events into `folder`.
    on_epoch  called after each epoch with its number and a line on how it went
    """
    device = next(training.model.parameters()).device
    load_checkpoint(training, folder)
    with MetricWriter(folder, training.global_step) as writer:
        log = StepLog(write=writer.write, every_steps=trainer.log_every_steps)
        while training.epoch < trainer.epochs:
            for group in training.optimizer.param_groups:
                group["lr"] = learning_rate(trainer, lr, training.epoch)
            for batch in stream.epoch(training.epoch, training.step):
                moved = move_batch(batch, device)
                terms = train_step(training, moved, input_size, trainer.clip_norm)
                training.step += 1
                training.global_step += 1
                log.add(training, terms, len(batch.keys))
            log.flush(training)
            training.epoch, training.step = training.epoch + 1, 0
            if (
                training.epoch % trainer.checkpoint_every_epochs == 0
                or training.epoch == trainer.epochs
            ):
                save_checkpoint(training, folder)
            on_epoch(training.epoch, f"loss {log.last_total:.3f}")


# ---- what is written -----------------------------------------------------------------------------


def save_checkpoint(training: Training, folder: Path) -> None:
    """Write the whole state in one commit: the old checkpoint stands until the new one does."""
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    write_atomically(folder / CHECKPOINT_NAME, buffer.getvalue())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Go on from the folder's checkpoint; nothing happens where there is none."""
    path = folder / CHECKPOINT_NAME
    if path.exists():
        device = next(training.model.parameters()).device
        state = torch.load(path, map_location=device, weights_only=True)
        state["random"] = state["random"].cpu()
        training.load_state(state)
