"""A stage in this process that reports its time and its private memory on standard output, as one line of JSON.

    python -m tests.benchmarks.probe stage verify store.path=stores/large
    python -m tests.benchmarks.probe batches:36 distill store.path=stores/large ...
    python -m tests.benchmarks.probe bare

`stage` runs the whole stage. `batches:N` ends it after N batches of a training, and also reports the loader processes.
With the environment variable PROBE_WAIT, the process then waits until that file exists. With PROBE_MODULES, `stage`
writes the names of all imported modules to that file. `bare` imports the code of a training, builds a network with its
optimizer and takes a step, without a store.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STARTED = float(os.environ.get("PROBE_STARTED", time.time()))
_SAMPLES_PER_SECOND = 20
_WARM = 20
"""Batches before the processor time of a step (batch and training) is measured, in ms."""


def private_mib(pid: int | str = "self") -> float:
    """Anonymous memory of a process in MiB: neither mapped files nor shared libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous", "Swap:")))
        / 1024
    )


class PeakMemory:
    """Largest private memory of this process, sampled by a thread."""

    def __init__(self) -> None:
        self.mib = 0.0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.mib = max(self.mib, private_mib())
            time.sleep(1 / _SAMPLES_PER_SECOND)


def _run_stage(words: list[str]) -> None:
    peak = PeakMemory()
    stage, sys.argv = words[0], words
    runpy.run_module(f"stages.{stage}", run_name="__main__")
    _report(seconds=time.time() - _STARTED, processor_s=time.process_time(), peak_mib=peak.mib)
    modules = os.environ.get("PROBE_MODULES")
    if modules is not None:
        Path(modules).write_text(json.dumps([*sys.modules]))


def _run_batches(count: int, words: list[str]) -> None:
    from permafrost.loading.loader import TrainLoader

    original = TrainLoader.epoch

    def epoch(self: TrainLoader, *place: Any, **options: Any) -> Iterator[Any]:
        seconds = warm = 0.0
        for number, batch in enumerate(original(self, *place, **options), start=1):
            seconds = seconds or time.time() - _STARTED
            if number == _WARM:
                warm = time.process_time()
            if number == count:
                _finish(seconds, 1000 * (time.process_time() - warm) / max(1, count - _WARM))
            yield batch

    TrainLoader.epoch = epoch  # type: ignore[method-assign]
    stage, sys.argv = words[0], words
    runpy.run_module(f"stages.{stage}", run_name="__main__")


def _finish(seconds: float, step_ms: float) -> None:
    """Report, wait if that is asked for, and end this process and its loaders."""
    children = _children()
    loaders = [private_mib(pid) for pid in children]
    _report(
        seconds=seconds,
        step_ms=step_ms,
        trainer_mib=private_mib(),
        loader_mib=max(loaders, default=0.0),
    )
    wait = os.environ.get("PROBE_WAIT")
    while wait and not Path(wait).exists():
        time.sleep(0.1)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _children() -> list[int]:
    """Loader processes of this process."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    found = [int(pid) for pid in path.read_text().split()]
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _run_bare() -> None:
    import torch

    import permafrost.training.distill
    import permafrost.training.loop
    from permafrost.config.models import CifarModelConfig
    from permafrost.models.providers import build_model

    _ = permafrost.training.loop, permafrost.training.distill
    network = build_model(CifarModelConfig(name="resnet8", width=4), 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(256, 3, 8, 8)).logits.sum().backward()
    optimizer.step()
    _report(trainer_mib=private_mib())


def _report(**values: float) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "bare":
        _run_bare()
    elif kind == "stage":
        _run_stage(rest)
    else:
        _run_batches(int(kind.removeprefix("batches:")), rest)
