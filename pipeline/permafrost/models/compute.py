"""Settings of a forward pass (precision, memory format, compilation, threads), and the numerics of a device.

float32 is that of IEEE 754 everywhere: torch's own default lets convolutions on NVIDIA GPUs since Ampere round their
operands to the 10 bits of TF32, whose errors are those of half precision. TF32 is a precision with a name here.
Some of torch's algorithms on GPUs add in an order that changes from run to run. Passes never use them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from permafrost.core.errors import ConfigError, require
from permafrost.models.classifier import NO_INTERMEDIATES, Intermediates, ModelOutput

_AMPERE = (8, 0)
"""Minimum compute capability for bfloat16 matrix products in an NVIDIA GPU's tensor cores."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Precision, memory format and compilation of a network's forward pass."""

    precision: torch.dtype = torch.float32
    """Precision of torch.autocast. The parameters stay float32."""
    tf32: bool = False
    """Whether products and convolutions of float32 may have the 10 bits of TF32."""
    compile: bool = False
    channels_last: bool = False

    @property
    def is_mixed(self) -> bool:
        """True if the pass has a lower precision than float32."""
        return self.precision != torch.float32

    @property
    def precision_name(self) -> str:
        """Name of the precision, as in options."""
        return "tf32" if self.tf32 else str(self.precision).removeprefix("torch.")

    def with_precision(self, name: str) -> ComputeSettings:
        """Return the settings with another precision.

        Args:
            name: Name of the precision, as in options, but not "auto".
        """
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        return replace(self, precision=dtype, tf32=name == "tf32")

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
        with (
            float32_products(tf32=self.tf32),
            torch.autocast(inputs.device.type, dtype=self.precision, enabled=self.is_mixed),
        ):
            return network(inputs, intermediates)._replace(images=inputs)


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Compute products and convolutions of float32 in the block as in IEEE 754, or in TF32 where a GPU has it.

    Torch keeps this setting for the process. It is put back at the end of the block.

    Args:
        tf32: Whether TF32 is allowed.
    """
    if torch.compiler.is_compiling():  # a program has the setting of the process that calls it
        yield
        return
    before = [kind.fp32_precision for kind in _kinds_of_products()]
    wanted = ["tf32" if tf32 else "ieee"] * len(before)
    if before == wanted or not (tf32 or "tf32" in before):  # none is that of IEEE 754, too
        yield
        return
    _set_products(wanted)
    try:
        yield
    finally:
        _set_products(before)


def _kinds_of_products() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


def _set_products(precisions: Sequence[str]) -> None:
    """Set the precision of convolutions, recurrent layers and products of matrices.

    Torch has older settings of the same, which networks may read, and raises an error where the two disagree.
    """
    torch.backends.cudnn.allow_tf32 = precisions[0] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precisions[-1] == "tf32"
    for kind, precision in zip(_kinds_of_products(), precisions, strict=True):
        if kind.fp32_precision != precision and (kind.fp32_precision, precision) != (
            "none",
            "ieee",
        ):
            kind.fp32_precision = precision


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in the types of the operands in the block, without autocast and TF32, as differences of gradients need.

    Args:
        device: Device of the operands.
    """
    with float32_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def deterministic_algorithms(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
    """Compute with algorithms of a GPU whose sums have a fixed order in the block, so that a repetition has equal bits.

    Torch warns of an operation that has no such algorithm. On a CPU the order depends on the number of threads only.

    Args:
        device: Device of the operands.
        enabled: False changes nothing.
    """
    if not enabled or device.type != "cuda":
        yield
        return
    os.environ.setdefault(*_CUBLAS_WORKSPACE)
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warns, fills = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=not before or warns)
    memory.fill_uninitialized_memory = (
        False  # which is a launch for each allocation, for what is overwritten
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Variable that cuBLAS reads before its first product, and the value with which its sums have a fixed order."""


def require_tf32(option: str, device: torch.device) -> None:
    """Check that a device has TF32.

    Args:
        option: Option that asks for it, for the message.
        device: The device.

    Raises:
        ConfigError: If it does not.
    """
    require(
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= _AMPERE,
        f"{option}=tf32: {device_name(device)} has no TF32, which NVIDIA GPUs have since Ampere; set it to float32",
    )


def resolve_device(option: str, name: str = "auto") -> torch.device:
    """Return the device that an option names. `auto` selects a GPU if one is available.

    Args:
        option: Name of the option, for the message.
        name: Its value.

    Raises:
        ConfigError: If the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"{option}={name} is not available ({error}); set it to auto or to another device"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the hardware that computes on a device, such as NVIDIA H100, or the kind of the device.

    Args:
        device: The device.
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def unused_accelerator() -> str | None:
    """Return the kind of this machine's accelerator if passes do not run on it, such as mps or xpu."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type == "cuda" else device.type


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
