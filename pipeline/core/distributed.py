"""The processes that train one network together, and what they tell each other (torch.distributed, no Ray).

Each rank has its slice of the same global batches; gradients are averaged over ranks of equal slices, so a
step is that of one process on the whole batch, up to what a slice decides alone: the statistics of a
BatchNorm in training mode, means over a part of a batch (known labels, `normalise_by=valid`), which record
comes before its first (the partner of mixup, `map_control=shuffled`), which negatives method=crd draws, and
which records method=sskd tells apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn


class RanksDisagreeError(UserError, RuntimeError):
    """Ranks of one run that do not see the same files."""


@dataclass(frozen=True)
class Ranks:
    """Which of the training processes this one is; the process group, if any, was started by others."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    """Given by who started the processes; None leaves it to trainer.device."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the run leaves behind."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass averages gradients; call it once a step.

        Gradients that `torch.autograd.grad` takes for an explanation start no communication: only the
        one `backward` of a step does.
        """
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices: list[Any] | None = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of parameters outside the wrapped model: a loss's own."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self.mean(parameter.grad))

    def mean(self, values: Tensor) -> Tensor:
        """Over the ranks, elementwise."""
        return values if self.world_size == 1 else self.sum(values) / self.world_size

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks, elementwise, on the device where `values` lie."""
        if self.world_size == 1:
            return values
        total = values if self.device is None else values.to(self.device)
        total = total.clone()
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """The ranks' values one after the other, in their order: [n, ...] -> [world_size * n, ...]."""
        if self.world_size == 1:
            return values
        own = values if self.device is None else values.to(self.device)
        everyones = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyones, own.contiguous())
        return torch.cat(everyones).to(values.device)

    def require_equal(self, values: Sequence[int], message: str) -> None:
        """RanksDisagreeError with `message` unless every rank has these values."""
        if self.world_size == 1:
            return
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, list(values))
        if any(other != list(values) for other in everyones):
            raise RanksDisagreeError(f"{message} (ranks are at {everyones})")
