"""Seeded draws of torch that leave its global generators, or leave them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWING = frozenset(
    {
        *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli),
        *(torch.multinomial, torch.poisson, torch.Tensor.uniform_, torch.Tensor.normal_),
        *(torch.Tensor.bernoulli, torch.Tensor.bernoulli_, torch.Tensor.multinomial),
        *(torch.Tensor.random_, torch.Tensor.exponential_, torch.Tensor.log_normal_),
        *(torch.Tensor.cauchy_, torch.Tensor.geometric_),
    }
)
"""Functions that draw from the global generator unless they are given another one."""


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put torch's global generators back into the state that they had, on the CPU and on each GPU in use."""
    before = torch.get_rng_state()
    has_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if has_gpus else None
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)


class SeededDraws(TorchFunctionMode):
    """Context in which draws on the CPU are those of a generator with a seed, in this thread only.

    They are the numbers that the global generator would draw after `manual_seed`, which is neither read nor changed:
    libraries that take no generator (Kornia, the initial weights of networks) are called within.
    """

    def __init__(self, seed: int) -> None:
        """Seed the generator."""
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # Functions of nn.init are called with generator=None, and what they call is not seen here.
        if (func in _DRAWING or "generator" in kwargs) and kwargs.get("generator") is None:
            kwargs["generator"] = self.generator
        if func in (torch.rand, torch.randn):  # of the default dtype, which is the whole process's
            kwargs.setdefault("dtype", torch.float32)
        return func(*args, **kwargs)
