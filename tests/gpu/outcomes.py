"""Results of a run: checks, rows of the table, and the machine that they belong to."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class CheckOutcome:
    """Result of one check."""

    name: str
    status: str
    """pass, fail or skip."""
    reason: str = ""
    """Reason of a failure or a skip, or the finding."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of the table: images per second of one way to work against a baseline on the same images."""

    name: str
    status: str
    """measured, skip or fail."""
    reason: str = ""
    images_per_second: float | None = None
    baseline: str = ""
    """Name of the baseline."""
    baseline_images_per_second: float | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Milliseconds per image by part: wall (all of it), host (decoding and reading, summed over
    threads), copy (for precompute with the warp to the teacher's input) and compute (on the device, including gaps
    between its kernels)."""
    utilization: float | None = None
    """Mean GPU utilization in percent as NVML reports it; None if it was not measured."""
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Speed relative to the baseline."""
        if not self.images_per_second or not self.baseline_images_per_second:
            return None
        return self.images_per_second / self.baseline_images_per_second


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: device, memory, versions."""
    about: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "gpus": 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        about |= {
            "device": found.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(found.total_memory / 2**30, 1),
            "capability": f"{found.major}.{found.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def as_json(machine: dict[str, Any], checks: list[CheckOutcome], rows: list[Row]) -> dict[str, Any]:
    """Content of gpu.json."""
    return {
        "machine": machine,
        "checks": [asdict(check) for check in checks],
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
