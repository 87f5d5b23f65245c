"""Settings of a forward pass (precision, memory format, compilation, threads), and the precision of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from permafrost.models.classifier import NO_INTERMEDIATES, Intermediates, ModelOutput

_AMPERE = (8, 0)
"""Minimum compute capability for bfloat16 matrix products in an NVIDIA GPU's tensor cores."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Precision, memory format and compilation of a network's forward pass."""

    precision: torch.dtype = torch.float32
    """Precision of torch.autocast. The parameters stay float32."""
    compile: bool = False
    channels_last: bool = False

    @property
    def is_mixed(self) -> bool:
        """True if the pass has a lower precision than float32."""
        return self.precision != torch.float32

    @property
    def precision_name(self) -> str:
        """Name of the precision, as in options."""
        return str(self.precision).removeprefix("torch.")

    def set_memory_format(self, network: nn.Module) -> None:
        """Put the convolutions of a network into the memory format, in place."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def run(
        self,
        network: Callable[[Tensor, Intermediates], ModelOutput],
        inputs: Tensor,
        intermediates: Intermediates = NO_INTERMEDIATES,
    ) -> ModelOutput:
        """Run one forward pass in this precision and memory format, with outputs as the network returns them.

        Args:
            network: Network to call; a compiled or wrapped one is called as it is.
            inputs: Images f32 [B, 3, H, W] in [0, 1], or rows of a table [B, d].
            intermediates: Intermediates to return in addition.
        """
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(inputs.device.type, dtype=self.precision, enabled=self.is_mixed):
            return network(inputs, intermediates)


def fastest_precision(device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return bfloat16 if the device multiplies its matrices several times as fast as those of float32, else float32.

    These are GPUs with tensor cores for bfloat16, and CPUs with AMX. A CPU that has bfloat16 as an AVX-512 instruction
    alone was slower with it than with float32 (docs/results/benchmarks.md), and one without either emulates it.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= _AMPERE else "float32"
    # oneDNN knows of ONEDNN_MAX_CPU_ISA, which may forbid what the CPU has.
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bfloat16" if has_amx and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch to `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
