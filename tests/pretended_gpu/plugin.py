"""Plug-in of pytest that gives the process a pretended GPU: pytest -p tests.pretended_gpu.plugin."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.pretended_gpu import device, extension

LAUNCHES: Counter[str] = Counter()
"""Operations on the device by test."""


def pytest_configure(config: Any) -> None:
    reason = extension.missing_part()
    if reason is not None:
        raise pytest.UsageError(f"no pretended GPU: {reason}")
    device.install()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    device.enter_thread()
    before = device.RECORD.launches.total()
    yield
    LAUNCHES[item.nodeid] += device.RECORD.launches.total() - before


def pytest_terminal_summary(terminalreporter: Any) -> None:
    used = sum(1 for count in LAUNCHES.values() if count)
    terminalreporter.write_line(
        f"pretended GPU: {used} of {len(LAUNCHES)} tests ran {LAUNCHES.total():,} operations on it"
    )
