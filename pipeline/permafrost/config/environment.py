"""Folders of the code, submitted jobs, reports of libraries, waiting threads, and the C library's memory allocator.

glibc maps large blocks anew and returns free memory to the system, which clears it page by page when it is used again.
On a CPU that takes as long as the convolutions of a small network: the pass of a ResNet-20 is 1.6 times as fast with an
allocator that keeps it (docs/results/benchmarks.md), with the same peak of memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from permafrost.core.machine import usable_cores

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package."""
TOP = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1]
"""Folder that holds conf/: the package in a wheel, the repository in a checkout."""
CONF = TOP / "conf"
"""Folder of the YAML files."""

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets for the driver of a submitted job."""


def in_submitted_job() -> bool:
    """Return whether this process is the driver of a submitted job, whose folder is a temporary copy."""
    return _JOB_VARIABLE in os.environ


# ---- reports of libraries --------------------------------------------------------------------------


NO_REPORTS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",  # Trackio imports Gradio
}
"""Variables with which a library reports nothing to its maker; most libraries read them when they are imported."""


def report_nothing() -> None:
    """Turn off reports of libraries to their makers, unless the user's environment turns them on."""
    for name, value in NO_REPORTS.items():
        os.environ.setdefault(name, value)


# ---- threads ---------------------------------------------------------------------------------------


THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Variables with which a thread of OpenMP looks for work for a tenth of a millisecond and then sleeps.

Threads that spin for longer take the cores of others on a busy machine: a loop is two to four times slower. Threads
that sleep at once are woken at every operation: two of them train a small network at 0.8 of the speed
(docs/results/benchmarks.md).
"""


def prepare_threads() -> None:
    """Set how many threads OpenMP has and how they wait, unless its variables are set, before PyTorch is imported.

    The command line and Ray's workers do so. In a user's own process the policy is the user's.
    """
    if usable_cores() < len(os.sched_getaffinity(0)):  # OpenMP does not know of a quota
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in THREAD_ENVIRONMENT.items():
            os.environ.setdefault(name, value)


# ---- allocator -------------------------------------------------------------------------------------


_KEPT_BYTES = 2**30
"""Maximum size of blocks taken from kept memory, and maximum amount of free memory that is kept."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""
ALLOCATOR_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
}
"""Variables that do the same for a process that is started with them."""


def keep_freed_memory() -> None:
    """Set the allocator of this process and of those that it starts, unless the user's environment sets it.

    Other C libraries than glibc are left as they are.
    """
    if any(name in os.environ for name in ALLOCATOR_ENVIRONMENT):
        return
    os.environ.update(ALLOCATOR_ENVIRONMENT)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


# ---- standard streams ------------------------------------------------------------------------------


def open_closed_streams() -> None:
    """Open the null device for standard streams that are closed, whose numbers the next files would get otherwise.

    What a library prints would then be written into a file of a store.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115


# ---- settings of torch -----------------------------------------------------------------------------


@contextmanager
def ordinary_torch() -> Iterator[None]:
    """Run the block with gradients, in float32, without autocast, and put the process's settings back afterwards.

    Torch is not imported: a process that has not imported it has not changed it.
    """
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
