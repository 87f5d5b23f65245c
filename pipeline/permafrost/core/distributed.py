"""Collective operations between the ranks that train one network (torch.distributed, without Ray).

Each rank processes its slice of the same global batches. Slices have equal size and gradients are averaged over the
ranks, so a step equals that of a single process on the whole batch, except for quantities that depend on the slice:
the statistics of a BatchNorm in training mode, means over a part of a batch (known labels, `normalize_by=valid`, the
cells of moved features that are inside of the frame), the record that precedes the first one
(`map_control=shuffled`), and negatives that a method draws from the batch. Relations of the records of a batch (RKD)
are those of the whole batch (`gather_with_gradient`).

Sums over the ranks add each value in the order of the ranks. A training that resumes on the same number of ranks
therefore has the same bits as an undisturbed one. Another number of ranks rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from permafrost.core.errors import UserError, require


class RanksDisagreeError(UserError, RuntimeError):
    """Ranks of one run that read different files."""


@dataclass(frozen=True)
class DistributedContext:
    """Position of this process among the training processes. The caller starts the process group, if there is one."""

    rank: int = 0
    world_size: int = 1
    device: torch.device | None = None
    """Device assigned by the launcher of the processes; None defers to trainer.device."""
    local_world_size: int | None = None
    """Number of ranks on this machine; None if all are."""
    on_line: Callable[[Mapping[str, float]], object] | None = None
    """Function that receives each line of the metrics on the first rank; None for no further use of them."""

    @property
    def is_first(self) -> bool:
        """True if this rank writes the outputs of the run."""
        return self.rank == 0

    @property
    def ranks_here(self) -> int:
        """Number of ranks that share the cores of this machine."""
        return self.world_size if self.local_world_size is None else self.local_world_size

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model wrapped so that its backward pass averages gradients. Call the result once per step.

        Only the single `backward` of a step communicates. Gradients that `torch.autograd.grad` computes for an
        explanation do not.

        DistributedDataParallel reorders its buckets after the first step of a process. Neither the sum of a gradient
        (`sum`) nor its alignment in memory, on which a norm's last bits depend on a GPU, may depend on this order.
        Gradients are therefore not views of the buckets, which takes the memory of one more copy of them.
        """
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices: list[Any] | None = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices)
        wrapped.register_comm_hook(
            devices, lambda devices, bucket: _completed(self.mean(bucket.buffer()), devices)
        )
        return wrapped

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients of parameters outside the wrapped model, such as those of a loss, in place."""
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self.mean(parameter.grad))

    def mean(self, values: Tensor) -> Tensor:
        """Return the elementwise mean over the ranks."""
        return values if self.world_size == 1 else self.sum(values) / self.world_size

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over the ranks, in their order, on the device of `values`.

        Each rank adds its part of the values of all ranks. `all_reduce` would send as many bytes, but the order in
        which it adds three or more ranks depends on a value's position in the tensor.
        """
        if self.world_size == 1:
            return values
        own = (values if self.device is None else values.to(self.device)).flatten()
        total = nn.functional.pad(own, (0, -len(own) % self.world_size))
        everyones = torch.empty_like(total)
        dist.all_to_all_single(everyones, total)
        dist.all_gather_into_tensor(total, reduce(torch.add, everyones.chunk(self.world_size)))
        return total[: len(own)].view_as(values).to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the values of all ranks, n on each, in rank order: [n, ...] -> [world_size * n, ...]."""
        if self.world_size == 1:
            return values
        on_device = values if self.device is None else values.to(self.device)
        everyones = [torch.empty_like(on_device) for _ in range(self.world_size)]
        dist.all_gather(everyones, on_device.contiguous())
        return torch.cat(everyones).to(values.device)

    def gather_with_gradient(self, values: Tensor) -> Tensor:
        """Concatenate the values of all ranks as `gather` does, for a loss that every rank computes of all of them.

        Gradients flow to this rank's own values, `world_size` times as large, so that their mean over the ranks, which
        a step takes, is the gradient of one process.
        """
        if self.world_size == 1:
            return values
        everyones, start = self.gather(values.detach()), self.rank * len(values)
        if (local := values.view_as(values)).requires_grad:
            local.register_hook(lambda gradient: gradient * self.world_size)  # type: ignore[no-untyped-call]
        return torch.cat([everyones[:start], local, everyones[start + len(values) :]])

    def require_equal(self, values: Sequence[int], message: str) -> None:
        """Check that all ranks pass the same values.

        Args:
            values: Values of this rank.
            message: Text of the error; the values of all ranks are added.

        Raises:
            RanksDisagreeError: If they differ.
        """
        if self.world_size == 1:
            return
        everyones: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyones, list(values))
        require(
            all(other == list(values) for other in everyones),
            f"{message} (values by rank: {everyones})",
            RanksDisagreeError,
        )


def _completed(values: Tensor, devices: list[Any] | None) -> torch.futures.Future[Tensor]:
    """Return a future that has its values already, on one of the devices or on the CPU."""
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(values)
    return future
