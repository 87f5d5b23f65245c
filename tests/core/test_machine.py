"""Cores and memory that this process may use, by affinity and the limits of control groups."""

import os

import pytest

from permafrost.core import machine
from permafrost.core.machine import usable_cores, usable_memory

GIB = 2**30
LARGE = 9223372036854771712


def separate(quota, memory):
    """Files of cgroup 1 in a container, whose own path they do not have."""
    return {
        "/proc/self/cgroup": "5:memory:/docker/f\n3:cpu,cpuacct:/docker/f\n0::/",
        "cpu/cpu.cfs_quota_us": str(quota),
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(memory),
    }


GROUPS = {
    "no groups": ({}, 8, 32),
    "no limit": ({"cpu.max": "max 100000", "memory.max": "max"}, 8, 32),
    "a container": ({"cpu.max": "150000 100000", "memory.max": str(4 * GIB)}, 2, 4),
    "half a core": ({"cpu.max": "50000 100000"}, 1, 32),
    "more than there is": ({"cpu.max": "6400000 100000", "memory.max": str(64 * GIB)}, 8, 32),
    "a group around it": (
        {
            "/proc/self/cgroup": "0::/slurm/job_7/step_0",
            "slurm/job_7/cpu.max": "300000 100000",
            "slurm/job_7/memory.max": str(6 * GIB),
        },
        *(3, 6),
    ),
    "a container of cgroup 1": (separate(250000, 5 * GIB), 3, 5),
    "no limit of cgroup 1": (separate(-1, LARGE), 8, 32),
}


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups_and_of_groups_around_them_count(monkeypatch, name):
    given, cores, gibibytes = GROUPS[name]
    files = {"/proc/meminfo": f"MemTotal: {32 * GIB // 1024} kB", "/proc/self/cgroup": "0::/"}
    files |= {
        path if path[0] == "/" else f"/sys/fs/cgroup/{path}": text for path, text in given.items()
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    assert (usable_cores(), usable_memory()) == (cores, gibibytes * GIB)


def test_an_affinity_counts_on_any_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    monkeypatch.setattr(os, "cpu_count", lambda: 32)

    assert usable_cores() == 1
