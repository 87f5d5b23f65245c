"""Two ranks that average the gradients of their halves of a batch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from permafrost.config.methods import E2KDConfig
from permafrost.config.training import OptimizerOptions
from permafrost.core.batches import Batch
from permafrost.core.distributed import DistributedContext
from permafrost.loading.transfer import move_batch
from permafrost.losses.base import build_loss
from permafrost.models.compute import ComputeSettings, float32_products
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import batch_loss
from tests.support.batches import FRAME, random_batch, tiny_model
from tests.support.ranks import leave_group

METHOD = E2KDConfig(tau=4.0, lambda_ce=1.0, lambda_map=5.0)


def build_tiny(
    device: torch.device,
    settings: ComputeSettings = ComputeSettings(),  # noqa: B008, frozen
    distributed: DistributedContext = DistributedContext(),  # noqa: B008, frozen
) -> Training:
    """Build the smallest training of frozen e2KD."""
    model = tiny_model(0).to(device)
    half = settings.precision == torch.float16
    return Training(
        model=model,
        loss=build_loss(METHOD).to(device),
        optimizer=build_optimizer(OptimizerOptions(), list(model.parameters()), fused=half),
        compute_settings=settings,
        distributed=distributed,
    )


def loss_and_gradient(training: Training, batch: Batch) -> tuple[float, Tensor]:
    """Loss of a batch and its gradient, f32 on the host. BatchNorm uses its running statistics."""
    device = next(training.model.parameters()).device
    training.model.eval()
    training.forward.eval()
    with float32_products():  # as in a step of a training
        loss = batch_loss(training, move_batch(batch, device), FRAME).total
        training.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    parts = [p.grad.flatten() for p in training.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts).float().cpu()


def half_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """Slice of a batch that a rank receives."""
    share = len(batch.keys) // world_size
    own = slice(rank * share, (rank + 1) * share)
    (targets,) = batch.targets
    taken = {name: value[own] for name, value in vars(targets).items() if isinstance(value, Tensor)}
    tensors = {name: value[own] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, keys=batch.keys[own], targets=(replace(targets, **taken),), **tensors)


def gradient_of_ranks(folder: Path, backend: str, device: str, seconds: float) -> Tensor:
    """Gradient that two ranks compute together, each in its own process.

    device   cuda, where a rank takes the GPU of its number, or cpu
    seconds  after which the processes are ended
    Raises TimeoutError, or the error of a rank.
    """
    context = torch.multiprocessing.start_processes(
        _run_rank, (folder, backend, device), nprocs=2, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"two ranks did not finish within {seconds:.0f} s")
    gradient: Tensor = torch.load(folder / "gradient.pt", weights_only=True)
    return gradient


def _run_rank(rank: int, folder: Path, backend: str, device: str) -> None:
    torch.set_num_threads(1)
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    training = build_tiny(own, distributed=DistributedContext(rank, 2, own))
    _, gradient = loss_and_gradient(training, half_of(random_batch(0), rank, 2))
    if rank == 0:
        torch.save(gradient, folder / "gradient.pt")
    dist.barrier()
    leave_group()
