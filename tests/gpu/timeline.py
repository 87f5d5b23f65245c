"""Timeline of a run: seconds on the host, and seconds on the device between events of its stream."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


class Timeline:
    """Seconds by part. Parts on the device are measured with events, which do not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first_start: dict[str, float] = {}
        """Time at which each part on the host began for the first time, by time.perf_counter."""
        self.last_end: dict[str, float] = {}
        """Time at which it ended for the last time."""
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    @contextmanager
    def on_host(self, part: str) -> Iterator[None]:
        """Count the seconds of the block on the host, in any thread."""
        started = time.perf_counter()
        self.first_start.setdefault(part, started)
        try:
            yield
        finally:
            with self._lock:
                self.last_end[part] = time.perf_counter()
                self._host[part] += self.last_end[part] - started

    @contextmanager
    def on_device(self, part: str) -> Iterator[None]:
        """Count the seconds that the device needs for the block. On the CPU these are the seconds of the host."""
        if self.device.type != "cuda":
            with self.on_host(part):
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        with self._lock:
            self._events.append((part, begin, end))

    @contextmanager
    def watch(self, owner: Any, name: str, part: str, *, device: bool) -> Iterator[None]:
        """Count every call of a function of a module or class while the block runs."""
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.on_device(part) if device else self.on_host(part):
                return original(*arguments, **options)

        with mock.patch.object(owner, name, watched):
            yield

    def seconds(self) -> dict[str, float]:
        """Seconds by part so far. Waits for the device."""
        total = defaultdict(float, self._host)
        if self._events:
            torch.cuda.synchronize(self.device)
        for part, begin, end in self._events:
            total[part] += begin.elapsed_time(end) / 1e3
        return dict(total)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
