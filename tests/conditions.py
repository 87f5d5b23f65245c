"""Conditions under which noxfile.py runs the tests, as a plug-in of pytest that checks them in each process."""

from __future__ import annotations

import importlib.metadata
import locale
import os
import re
import resource
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.paths import ROOT

VARIABLE = "PERMAFROST_TEST_CONDITION"
"""Environment variable that names the condition under which the tests run."""
RESOLVED = "resolved.txt"
"""File in an environment with the versions it was made from, if they are not the pinned ones."""
SELECTION = (
    *("tests/core", "tests/storage", "tests/config", "tests/store", "tests/sources", "tests/docs"),
    *("tests/stages/test_flow.py", "tests/stages/test_commandline.py"),
    *("tests/test_golden.py", "tests/test_isolation.py", "tests/test_store_format.py"),
)
"""Tests of what depends on the machine."""
ON_DEVICES = tuple(
    f"tests/{name}"
    for name in ("annotation", "evaluation", "loading", "losses", "models", "papers", "training")
)
"""Tests of what runs on the device of a network."""


@dataclass(frozen=True)
class Condition:
    """Condition under which the tests must pass."""

    text: str
    holds: Callable[[pytest.Config], bool]
    """Check in a process of the tests that the condition holds."""


def umask() -> int:
    """Return the umask of this process."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def is_home_read_only() -> bool:
    """Try to write to the home folder."""
    try:
        (Path.home() / "written").write_text("")
    except OSError:
        return True
    return False


def is_other_file_system() -> bool:
    """Return whether temporary files are on another file system, in a folder of the name that the session gave it."""
    place = tempfile.gettempdir()
    return "ü " in place and Path(place).stat().st_dev != Path.cwd().stat().st_dev


def cpu_capability() -> str:
    """Return the vector instructions that ATen uses."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def is_turkish() -> bool:
    """Return whether names and numbers are Turkish."""
    name = locale.setlocale(locale.LC_ALL, "")
    return name == "tr_TR.UTF-8" and locale.localeconv()["decimal_point"] == ","


def has_packages(requirements: Path) -> bool:
    """Return whether this is an environment of nox whose packages have the versions of a file."""
    if not Path(sys.prefix).is_relative_to(ROOT / ".nox") or not requirements.is_file():
        return False
    versions = defaultdict(set)
    for name, version in re.findall(
        r"^([\w.-]+)(?:\[.*\])?==([^\s;]+)", requirements.read_text(), re.M
    ):
        versions[name].add(version)
    installed = {
        re.sub(r"[-_.]+", "-", each.name).lower(): each.version.partition("+")[0]
        for each in importlib.metadata.distributions()
    }
    # A package without a version here is for another platform; one with two is for other versions of Python.
    return bool(versions) and all(
        installed[name] in versions[name] for name in versions.keys() & installed.keys()
    )


def is_python(version: str) -> bool:
    """Return whether this is a version of Python such as 3.12 with the pinned packages."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    return here == version and has_packages(ROOT / "requirements.lock")


def is_resolved() -> bool:
    """Return whether the packages have the versions that the session has resolved."""
    return has_packages(Path(sys.prefix) / RESOLVED)


CONDITIONS = {
    "one-core": Condition("one core", lambda _: len(os.sched_getaffinity(0)) == 1),
    "instructions": Condition(
        "AVX2 in oneDNN and no vector instructions in ATen", lambda _: cpu_capability() == "DEFAULT"
    ),
    "c-locale": Condition("LC_ALL=C", lambda _: locale.setlocale(locale.LC_ALL, "") == "C"),
    "turkish": Condition("LC_ALL=tr_TR.UTF-8, also for numbers and dates", lambda _: is_turkish()),
    "time-zone": Condition(
        "a time zone 5:45 hours east of Greenwich", lambda _: time.localtime().tm_gmtoff == 20700
    ),
    "umask": Condition("umask 077", lambda _: umask() == 0o077),
    "user": Condition(
        "a user other than root, and a checkout that only root can write",
        lambda _: os.geteuid() != 0 and not os.access(Path.cwd(), os.W_OK),
    ),
    "read-only-home": Condition(
        "a home folder that cannot be written", lambda _: is_home_read_only()
    ),
    "no-home": Condition("no variable HOME", lambda _: "HOME" not in os.environ),
    "file-system": Condition(
        "TMPDIR on a tmpfs, with a space and an umlaut in its name",
        lambda _: is_other_file_system(),
    ),
    "no-git": Condition("an unpacked copy without .git", lambda _: not Path(".git").exists()),
    "no-papers": Condition(
        "permafrost without the packages of the papers",
        lambda _: find_spec("permafrost_papers") is None,
    ),
    "pretended-gpu": Condition(
        "a pretended GPU, for what runs on devices",
        lambda config: config.pluginmanager.hasplugin("tests.pretended_gpu.plugin"),
    ),
    "no-xdist": Condition(
        "one process, without pytest-xdist",
        lambda config: not config.pluginmanager.hasplugin("xdist"),
    ),
    "random-order": Condition(
        "modules and tests in random order",
        lambda config: bool(config.getoption("random_order_bucket", None)),
    ),
    "busy-1": Condition("one process beside two busy ones", lambda _: True),
    "busy-4": Condition("four processes beside two busy ones", lambda _: True),
    "few-files": Condition(
        "256 open files per process", lambda _: resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
    ),
    "proxy": Condition(
        "a proxy that does not answer",
        lambda _: urllib.request.getproxies().get("http") == "http://127.0.0.1:9",
    ),
    "terminal": Condition("TERM=dumb", lambda _: os.environ.get("TERM") == "dumb"),
    "hash-seed": Condition(
        "another hash seed", lambda _: os.environ.get("PYTHONHASHSEED") == "4242"
    ),
    **{
        f"python{version}": Condition(
            "the pinned packages", lambda _, version=version: is_python(version)
        )
        for version in ("3.11", "3.12", "3.13", "3.14")
    },
    "lowest": Condition(
        "the lowest version of every package that pyproject.toml allows", lambda _: is_resolved()
    ),
    "highest": Condition(
        "the highest version of every package that pyproject.toml allows", lambda _: is_resolved()
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    """Check, in each process that runs tests, that the condition holds and that the intended files are tested."""
    import permafrost

    name = os.environ[VARIABLE]
    if not CONDITIONS[name].holds(config):
        pytest.exit(f"the condition {name} does not hold", returncode=3)
    if not Path(permafrost.__file__).is_relative_to(Path.cwd()):
        pytest.exit(f"the tests would import {permafrost.__file__}", returncode=3)
