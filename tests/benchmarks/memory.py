"""Peak memory of whole commands for a number of records and for five times that number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.figures import Figure, exact
from tests.benchmarks.inputs import TINY, write_tars

FEW, MANY = 10_000, 50_000
_MEBI_PER_KIBI = 1 / 1024


def memory_figures(folder: Path) -> list[Figure]:
    """Peak resident set of precompute and of one epoch of distill."""
    peaks = {records: _peaks(folder / str(records), records) for records in (FEW, MANY)}
    return [
        exact(
            f"{stage}_memory_50k_vs_10k",
            peaks[MANY][stage],
            peaks[FEW][stage],
            unit="MiB",
            aim="<= 1.05",
        )
        for stage in ("precompute", "distill")
    ]


def _peaks(folder: Path, records: int) -> dict[str, float]:
    tars = write_tars(folder / "tars", records, 32, distinct=1_000)
    store, network = f"store.path={folder / 'store'}", [f"name={TINY.name}", f"width={TINY.width}"]
    run = f"run={folder / 'run'}"
    commands = {
        "precompute": [
            *("data=webdataset", f"data.path={tars}", store, run, "executor=serial"),
            *(f"teacher.{option}" for option in [*network, "weights=random"]),
        ],
        "distill": [
            *(store, run, *(f"student.{option}" for option in network)),
            *("trainer.epochs=1", "trainer.batch_size=200", "trainer.num_threads=1"),
        ],
    }
    return {stage: _peak(stage, words) for stage, words in commands.items()}


# VmHWM covers the program alone, whereas a child's ru_maxrss starts from its parent's value.
_PROBE = """
import runpy, sys
stage, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module(f"stages.{stage}", run_name="__main__")
print(*[line for line in open("/proc/self/status") if line.startswith("VmHWM")], end="")
"""


def _peak(stage: str, words: list[str]) -> float:
    """Peak memory of the command's process in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, stage, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"stages.{stage} exits with {done.returncode}: {done.stderr}")
    return int(done.stdout.splitlines()[-1].split()[1]) * _MEBI_PER_KIBI
