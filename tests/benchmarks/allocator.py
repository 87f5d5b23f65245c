"""Gain of memory that is kept for the next batch, in processes of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from permafrost.config.environment import ALLOCATOR_ENVIRONMENT
from tests.benchmarks.figures import Figure, figure
from tests.benchmarks.inputs import pack, write_tars

RECORDS = 6000
ROUNDS = 3
_STAGE = "import runpy; runpy.run_module('stages.precompute', run_name='__main__')"
_WITHOUT = f"import permafrost.cli; permafrost.cli.keep_freed_memory = lambda: None; {_STAGE}"


def allocator_figure(folder: Path) -> list[Figure]:
    """Measure the pass of a ResNet-20 with GradCAM against the same with the C library's defaults."""
    tars, store = write_tars(folder / "tars", RECORDS, 32, distinct=100), folder / "store"
    pack(tars, store)
    words = [
        *("data=webdataset", f"data.path={tars}", f"store.path={store}", f"run={folder / 'run'}"),
        *("executor=serial", "teacher=cifar", "teacher.name=resnet20", "teacher.weights=random"),
        "teacher.classes=10",
    ]

    def seconds(code: str) -> float:
        """Seconds that the stage states for the pass, without imports and start."""
        shutil.rmtree(store / "teachers", ignore_errors=True)
        inherited = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_ENVIRONMENT}
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=inherited,
            capture_output=True,
            text=True,
            check=True,
        )
        (rate,) = re.findall(r"^records_per_second: ([\d,]+)$", done.stdout, re.MULTILINE)
        return RECORDS / float(rate.replace(",", ""))

    return [
        figure(
            "precompute_kept_memory_vs_returned",
            [(seconds(_STAGE), seconds(_WITHOUT)) for _ in range(ROUNDS)],
            faster=True,
            unit="ms/record",
            scale=1e3 / RECORDS,
            aim="",
        )
    ]
