"""GPU utilization as NVML reports it, sampled while blocks run."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

_INTERVAL = 0.05


class UtilizationMeter:
    """Sampler of `torch.cuda.utilization`, which needs NVML's Python bindings (nvidia-ml-py).

    As a context it samples while the block runs. It can be entered several times.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> UtilizationMeter:
        self._stop.clear()
        if self.device.type == "cuda" and self._read() is not None:
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def mean(self) -> float | None:
        """Mean in percent, None if it was not measured."""
        return sum(self._samples) / len(self._samples) if self._samples else None

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            value = self._read()
            if value is not None:
                self._samples.append(value)

    def _read(self) -> float | None:
        try:
            return float(torch.cuda.utilization(self.device))
        except Exception:  # no bindings, no NVML, or no permission: all mean "not measured"
            return None
