"""Processes that tests start, watch and kill."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.paths import ROOT


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def descendants(pid):
    """Process ids of all descendants of `pid`."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def status(pid):
    """State of a process: R, S, T (stopped), ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_until(condition, process=None, seconds=90):
    """Wait for the condition's first true value and return it. The process, if given, must not end before that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError("waited in vain")
