"""Cores and memory that this process may use, within its affinity and the limits of control groups."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    The number is that of its affinity (taskset, Slurm), or the CPU quota of its control group (docker run --cpus,
    Kubernetes) if that is smaller, rounded up.
    """
    quotas = (
        text.split() for text in _limits("cpu", "cpu.max", "cpu.cfs_quota_us cpu.cfs_period_us")
    )
    limits = (math.ceil(int(words[0]) / int(words[1])) for words in quotas if words[0].isdecimal())
    return max(1, min([len(os.sched_getaffinity(0)), *limits]))


def usable_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its control group."""
    limits = _limits("memory", "memory.max", "memory.limit_in_bytes")
    return min([memory_entry("MemTotal"), *(int(text) for text in limits if text.isdecimal())])


def memory_entry(name: str) -> int:
    """Return an entry of /proc/meminfo in bytes, 0 if it is missing."""
    entry = re.search(rf"^{name}:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(entry[1]) * 1024 if entry else 0


def _limits(controller: str, unified: str, separate: str) -> Iterator[str]:
    """Iterate over the limits of this process's control group and of the groups around it.

    Args:
        controller: Name of a controller of cgroup 1.
        unified: Names of the files of cgroup 2, with a space between them.
        separate: Names of the files of cgroup 1.
    """
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = f"/sys/fs/cgroup/{controller}" if controllers else "/sys/fs/cgroup"
        names = separate if controllers else unified
        for folder in (PurePosixPath(group), *PurePosixPath(group).parents):
            texts = [
                _read(f"{top}/{str(folder).strip('/')}/{name}".replace("//", "/"))
                for name in names.split()
            ]
            if all(texts):
                yield " ".join(texts)


def _read(path: str) -> str:
    """Return the content of a file of the kernel, or nothing if there is none."""
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""
