"""The state of a training: network, loss, optimizer and position, as checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from pipeline.config.training import OptimizerOptions
from pipeline.core.distributed import DistributedContext
from pipeline.core.errors import ConfigError
from pipeline.core.seeds import derive_seed
from pipeline.loading.geometry import view_targets
from pipeline.losses.base import DistillationLoss
from pipeline.models.classifier import Classifier
from pipeline.models.explainers.explain import DEFAULT_EXPLAINER, EXPLAINERS, Explainer
from pipeline.training.targets import TargetSource
from pipeline.training.transforms import BatchTransform, Mixup


def build_optimizer(
    config: OptimizerOptions, parameters: list[nn.Parameter], *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `optimizer=` names, over all parameters alike.

    fused  one that skips a step of infinite gradients by itself: a GradScaler then never waits
    """
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused or None}
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, **common)
    if config.kind == "adam":
        return torch.optim.Adam(parameters, config.lr, **common)
    return torch.optim.AdamW(parameters, config.lr, **common)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How the student's forward and backward pass are computed; never what."""

    precision: torch.dtype = torch.float32
    """Of torch.autocast; the parameters, the loss and the explanations stay float32."""
    compile: bool = False
    channels_last: bool = False


@dataclass(kw_only=True)
class Training:
    """A model that learns, and where it is; what changes is in its checkpoints."""

    model: Classifier
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer
    explain: Explainer = EXPLAINERS[DEFAULT_EXPLAINER]
    """The teacher's own, so that equal maps mean equal explanations; not in a checkpoint."""
    targets: TargetSource = view_targets
    teacher_weights: tuple[float, ...] = ()
    """Of each teacher's loss, summing to 1; empty weighs all alike."""
    transforms: tuple[BatchTransform, ...] = (Mixup(),)
    """Called in turn on what each step trains on."""
    seed: int = 0
    """Of what a step draws by itself, such as a dropout's mask."""
    compute_settings: ComputeSettings = field(default_factory=ComputeSettings)
    distributed: DistributedContext = field(default_factory=DistributedContext)
    epoch: int = 0
    step: int = 0
    """Of the epoch: the next one to take."""
    global_step: int = 0
    forward: nn.Module = field(init=False)
    """The model as it is called: averaging gradients over ranks, compiled, or itself."""
    scaler: torch.amp.GradScaler = field(init=False)
    """Keeps float16 gradients from vanishing; does nothing in other precisions."""

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.loss.distributed = self.distributed
        if self.compute_settings.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.forward = self.distributed.wrap(self.model, device)
        if self.compute_settings.compile:
            self._refuse_double_backward()
            self.forward = cast("nn.Module", torch.compile(self.forward))
        half = self.compute_settings.precision == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def _refuse_double_backward(self) -> None:
        if self.loss.needs.maps_in(0) and self.model.train().head is None:
            raise ConfigError(
                "trainer.compile=true: this student's explanation differentiates its head by autograd, and a "
                "compiled pass cannot be differentiated twice; set trainer.compile=false, or choose a student "
                "whose head is linear on the average of its features"
            )

    def state(self) -> dict[str, Any]:
        """For `load_state`: tensors and plain values, the live ones; save or copy it before training on."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": [self.epoch, self.step, self.global_step],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, by any number of ranks."""
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.global_step = state["position"]

    def seed_step(self) -> None:
        """Seed what the next step draws: a function of (seed, step, rank), so no state has to be kept."""
        torch.manual_seed(derive_seed(self.seed, "step", self.global_step, self.distributed.rank))
