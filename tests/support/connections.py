"""Names that a command looks up and addresses that it connects to, also in native code and child processes."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import psutil

from permafrost.config.environment import NO_REPORTS
from tests.support.processes import environment

WHY_NOT = (
    "it preloads a library for Linux that cc compiles"
    if sys.platform != "linux" or shutil.which("cc") is None
    else ""
)
"""Why nothing can be recorded here, empty if it can."""
OF_RAY = {
    "connect-udp 8.8.8.8",  # sends nothing: the system names the address that it would send from
    "getaddrinfo 8.8.8.8",
    "connect 169.254.169.254",
    "getaddrinfo 169.254.169.254",
    "getaddrinfo metadata.google.internal",
}
"""Calls in which Ray asks for more than this machine, with usage statistics off (SECURITY.md)."""


def compile_recorder(folder: Path) -> Path:
    """Compile the library that is preloaded."""
    library = folder / "connections.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def recorded_environment(library: Path, folder: Path) -> dict[str, str]:
    """Return an environment in which commands record what they ask for, with a home folder of their own.

    Variables that stop reports of libraries are left out, so that the command has to set them.
    """
    (folder / "home").mkdir(exist_ok=True)
    kept = {name: value for name, value in environment().items() if name not in NO_REPORTS}
    return kept | {
        "LD_PRELOAD": str(library),
        "CONNECTIONS": str(folder / "connections.txt"),
        "HOME": str(folder / "home"),
    }


def asked_beyond_this_machine(folder: Path) -> set[str]:
    """Return recorded calls, as "connect 192.0.2.1", whose name or address is not of this machine; forget them all."""
    path = folder / "connections.txt"
    calls = (
        {line.rsplit(" ", 1)[0] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )
    path.unlink(missing_ok=True)
    return {call for call in calls if not _is_here(call.partition(" ")[2])}


def reports_of_libraries(folder: Path) -> list[str]:
    """Return the files that libraries of Microsoft keep for their reports in the home folder."""
    return [str(path) for path in (folder / "home").rglob("*") if "microsoft" in str(path).lower()]


def _is_here(name: str) -> bool:
    if name in ("localhost", socket.gethostname(), socket.getfqdn(), os.uname().nodename):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    own = {each.address.partition("%")[0] for each in chain(*psutil.net_if_addrs().values())}
    return address.is_loopback or address.is_unspecified or str(address) in own
