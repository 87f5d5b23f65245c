"""State of a training: network, loss, optimizer and position, as stored in checkpoints."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import PARAM_LIST, AveragedModel, get_ema_multi_avg_fn

from permafrost.core.batches import NO_TARGETS, Batch, Targets
from permafrost.core.digests import derive_seed
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.loading.geometry import TargetRequest, view_targets
from permafrost.loading.mixtures import labels_of
from permafrost.losses.base import DistillationLoss, StepInputs
from permafrost.models.classifier import Classifier
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import DEFAULT_EXPLAINER, Explainer, explainer_named
from permafrost.training.targets import TargetSource

logger = logging.getLogger("permafrost.training")


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators that draw on a device, and that of the CPU.

    torch.manual_seed would also record the stack for each kind of device that is not in use, which takes a tenth of a
    millisecond or more.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)


@dataclass(kw_only=True)
class Training:
    """A model in training and its position. All mutable state is stored in its checkpoints."""

    model: Classifier
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer
    explain: Explainer = field(default_factory=lambda: explainer_named(DEFAULT_EXPLAINER))
    """Explainer of the teacher, so that equal maps mean equal explanations, or method.explainer. It is not part of a
    checkpoint."""
    map_grid: tuple[int, int] | None = None
    """(h, w) of the student's maps, None if the loss needs none."""
    targets: TargetSource = view_targets
    """Source of the teachers' targets, before what the loss changes of them."""
    sums_teachers: bool = False
    """True to add the losses of the teachers, which have weights of their own, in place of their mean."""
    seed: int = 0
    """Seed of the random draws within a step, such as dropout masks."""
    compute_settings: ComputeSettings = field(default_factory=ComputeSettings)
    """Settings of the student. The loss and the explanations stay float32."""
    distributed: DistributedContext = field(default_factory=DistributedContext)
    weights: Tensor | None = None
    """Weight of each record of the selection by their mean, f32 [n] on the model's device; None for equal ones."""
    ema: float | None = None
    """Decay of the moving average of the weights, None for none."""
    average: AveragedModel | None = None
    """The moving average, None before the first step."""
    has_labels: bool = False
    """True to log the training accuracy, which needs records with labels of the model's classes."""
    epoch: int = 0
    step: int = 0
    """Next step of the epoch."""
    global_step: int = 0
    forward: nn.Module = field(init=False)
    """The callable model: wrapped to average gradients over ranks, compiled, or the model itself."""
    scaler: torch.amp.GradScaler = field(init=False)
    """Gradient scaler for float16, disabled in other precisions."""

    def __post_init__(self) -> None:
        self.loss.distributed = self.distributed
        self.compute_settings.set_memory_format(self.model)
        self.forward = self.distributed.wrap(self.model, self.model.device)
        if self.compute_settings.compile:
            require(
                not self.loss.needs.maps_in(0) or self.model.train().head is not None,
                "trainer.compile=true: the explanation of this student differentiates its head by autograd, but a "
                "compiled forward pass cannot be differentiated twice; set trainer.compile=false",
            )
            self.forward = cast("nn.Module", torch.compile(self.forward))
        half = self.compute_settings.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=half)

    @property
    def network(self) -> Classifier:
        """Network that is evaluated and saved: the average of the weights, or without one the model itself."""
        return self.model if self.average is None else cast("Classifier", self.average.module)

    def update_average(self) -> None:
        """Add the weights after a step to their moving average, which begins with those of the first step."""
        if self.ema is not None:
            self.average = self.average or self._new_average(self.ema)
            self.average.update_parameters(self.model)

    def _new_average(self, decay: float) -> AveragedModel:
        """Copy the model for its average, W <- decay W + (1 - decay) w; buffers of whole numbers are those of w."""
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

        def average(averaged: PARAM_LIST, current: PARAM_LIST, count: Tensor | int) -> None:
            if averaged[0].is_floating_point():
                update(averaged, current, count)
            else:
                torch._foreach_copy_(averaged, current)

        return AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    def prepare(self, batch: Batch, images: Tensor) -> StepInputs:
        """Return the images of a batch in their views and the labels that belong to them, changed as the loss asks."""
        inputs = StepInputs(images=images, labels=labels_of(batch))
        for transform in self.loss.transforms:
            inputs = transform(inputs, batch)
        return inputs

    def read_targets(self, batch: Batch, request: TargetRequest) -> tuple[Targets, ...]:
        """Return the targets of each teacher in the form that the loss reads; NO_TARGETS if it reads labels only."""
        if not self.loss.needs.targets:
            return (NO_TARGETS,)
        return self.loss.convert_targets(self.targets(batch, request))

    def state(self) -> dict[str, Any]:
        """Return the state for `load_state`. Its tensors are not copied, so save or copy it before the next step."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **({} if self.average is None else {"average": self.average.state_dict()}),
            "precision": self.compute_settings.precision_name,
            "position": [self.epoch, self.step, self.global_step],
            "ranks": self.distributed.world_size,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state exactly, with the precision that it was trained in, and warn of another number of ranks."""
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and "average" in state:
            self.average = self._new_average(self.ema)
            self.average.load_state_dict(state["average"])
        # trainer.precision=auto may have chosen another one on this device.
        self.compute_settings = self.compute_settings.with_precision(state["precision"])
        self.epoch, self.step, self.global_step = state["position"]
        ranks, now = state.get("ranks"), self.distributed.world_size
        if ranks not in (None, now) and self.distributed.is_first:
            logger.warning(
                "the checkpoint is from trainer.ranks=%d; on trainer.ranks=%d, sums round otherwise, so the weights "
                "will differ slightly from an undisturbed training's",
                ranks,
                now,
            )

    def seed_step(self) -> None:
        """Seed the random draws of the next step from (seed, step, rank), so no generator state has to be stored."""
        seed_generators(
            derive_seed(self.seed, "step", self.global_step, self.distributed.rank),
            self.model.device,
        )
