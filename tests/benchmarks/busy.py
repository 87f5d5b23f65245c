"""A small network's training on a busy machine: its speed alone, and next to processes that never wait.

    python -m tests.benchmarks busy           (about 5 minutes; only if it is named)

The aim: at most 1.5 times the seconds that a fair share of the cores would take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("busy.json")
HOGS = 2
SLACK = 1.5
_WAITING = {
    "waiting passively": {},
    "spinning while they wait": {"OMP_WAIT_POLICY": "ACTIVE"},
}
_CASES = (
    ("waiting passively", 1),
    ("waiting passively", 2),
    ("spinning while they wait", 2),
)


@dataclass(frozen=True, kw_only=True)
class BusyTraining:
    """Seconds that the demo's teacher takes for its records once."""

    waiting: str
    threads: int
    cores: int
    alone: float
    beside_one: float
    """Next to one hog, with which one thread need not share its core."""
    beside_two: float

    @property
    def slowdown(self) -> float:
        """Seconds next to two hogs, relative to those alone."""
        return self.beside_two / self.alone

    @property
    def limit(self) -> float:
        """Largest slowdown that meets the aim."""
        return SLACK * max(1.0, (self.threads + HOGS) / self.cores)


def measure(words: Sequence[str]) -> list[BusyTraining]:
    """Measure all cases."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        common = ["experiment=demo", f"store.path={folder}/store"]
        _stage("precompute", *common, f"run={folder}/packed", "teacher=none", "executor=serial")
        return [_measure(Path(folder), common, *case) for case in _CASES]


def _measure(folder: Path, common: list[str], waiting: str, threads: int) -> BusyTraining:
    seconds = []
    for hogs in range(HOGS + 1):
        run = f"{folder}/{len(waiting)}-{threads}-{hogs}"
        words = [*common, f"run={run}", "teaching.trainer.epochs=3"]
        with _hogs(hogs):
            _stage("teach", *words, f"teaching.trainer.num_threads={threads}", **_WAITING[waiting])
        cost = json.loads((Path(run) / "teach" / "cost.json").read_text())
        seconds.append(cost["seconds"] / 3)
    alone, one, two = seconds
    return BusyTraining(
        waiting=waiting,
        threads=threads,
        cores=len(os.sched_getaffinity(0)),
        alone=alone,
        beside_one=one,
        beside_two=two,
    )


@contextmanager
def _hogs(count: int) -> Iterator[None]:
    """Run processes that use a core each while the block runs."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def _stage(stage: str, *words: str, **environment: str) -> None:
    threads = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in threads}
    subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *words],
        env=inherited | environment,
        check=True,
        capture_output=True,
    )


def markdown(found: Sequence[BusyTraining]) -> str:
    """Markdown table of all cases."""
    lines = [
        "| threads | alone, s | beside one hog | beside two | slowdown | aim |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        ratio = f"{one.slowdown:.2f}"
        lines.append(
            f"| {one.threads}, {one.waiting} | {one.alone:.1f} | {one.beside_one:.1f} | {one.beside_two:.1f} | "
            f"{f'**{ratio}**' if one.slowdown <= one.limit else ratio} | <= {one.limit:.2f} |"
        )
    return "\n".join(lines) + "\n"


def load() -> list[BusyTraining]:
    """Read the recorded cases."""
    return [BusyTraining(**values) for values in json.loads(RESULTS.read_text())]
