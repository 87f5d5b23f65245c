"""Sockets that wait for connections while a command runs."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.support.processes import environment


class Listener(NamedTuple):
    """Socket of a process that accepts connections."""

    program: str
    """Name of the process's program: raylet, gcs_server, python ..."""
    reach: str
    """all interfaces, or this machine."""


def listeners_of(pid: int) -> set[Listener]:
    """Return the listening TCP sockets of a process and of its descendants."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                sockets = process.net_connections("inet")
                found |= {
                    Listener(program_of(process), reach_of(each.laddr.ip))
                    for each in sockets
                    if each.status == psutil.CONN_LISTEN
                }
    return found


def program_of(process: psutil.Process) -> str:
    """Return the name of a process's program, for Python that of its script or of its Ray role."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return "worker"
    scripts = [Path(word).name for word in words[:4] if word.endswith(".py")]
    name = scripts[0] if scripts else Path(words[0]).name
    return {
        "main.py": "agent",
        "agent.py": "agent",
        "default_worker.py": "worker",
        "setup_worker.py": "worker",
        "monitor.py": "monitor",
        "dashboard.py": "dashboard",
        "log_monitor.py": "monitor",
    }.get(name, name)


def reach_of(ip: str) -> str:
    """Return who can connect to an address."""
    return "this machine" if ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") else "all interfaces"


def listeners_while(
    words: list[str], folder: Path, variables: dict[str, str] | None = None
) -> tuple[set[Listener], str]:
    """Run a command to its end, and return every socket that listened and what it printed.

    Raises AssertionError if the command fails. A socket that is closed within 0.1 s may be missed.
    """
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=variables or environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        found = set()
        while process.poll() is None:
            found |= listeners_of(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        output.seek(0)
        text = output.read()
    assert process.returncode == 0, text
    assert os.getpid() != process.pid
    return found, text
