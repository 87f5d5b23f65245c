"""Plug-in of pytest that gives the process a pretended GPU: pytest -p tests.pretended_gpu.plugin."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.pretended_gpu import device, extension

LIMITS = {
    "tests/training/test_one_graph.py": "torch.compile takes no mode that dispatches",
    "tests/models/test_foreign_weights.py::test_a_file_of_another_tool_is_named_with_the_way_out[TorchScript": (
        "TorchScript takes no tensors of another class"
    ),
    "tests/models/test_foreign_weights.py::test_the_way_out_of_a_program": (
        "TorchScript takes no tensors of another class"
    ),
    "tests/models/test_gradcam_heads.py::test_fused": "fused attention of CUDA has no kernel on a CPU",
    "tests/models/test_module_layers.py::test_wrappers": "DataParallel asks the driver for properties",
    "tests/models/test_weights_files.py::test_the_averages": "DataParallel asks the driver for properties",
    "tests/papers/bcos/test_bcos_weights.py::test_a_loss_that_is_differentiated": (
        "hooks of parameters are lost where a module is moved"
    ),
}
"""Beginnings of the names of tests that only a real device or none can run, with the reason."""
LAUNCHES: Counter[str] = Counter()
"""Operations on the device by test."""


def pytest_configure(config: Any) -> None:
    reason = extension.missing_part()
    if reason is not None:
        raise pytest.UsageError(f"no pretended GPU: {reason}")
    device.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in LIMITS.items():
            if item.nodeid.startswith(name):
                item.add_marker(pytest.mark.skip(reason=f"pretended GPU: {reason}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: Any) -> Any:
    device.enter_thread()
    before = device.RECORD.launches.total()
    yield
    item.user_properties.append(("launches", device.RECORD.launches.total() - before))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count, also in the process that collects the reports of others."""
    if report.when == "call":
        LAUNCHES[report.nodeid] += int(str(dict(report.user_properties).get("launches", 0)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    used = sum(1 for count in LAUNCHES.values() if count)
    terminalreporter.write_line(
        f"pretended GPU: {used} of {len(LAUNCHES)} tests ran {LAUNCHES.total():,} operations on it"
    )
