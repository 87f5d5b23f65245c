"""Tests leave the checkout as it is, and their processes share nothing."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.durations import measured
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.scheduler import sort_by_durations


@pytest.fixture(scope="session")
def folder_of_a_session():
    """Working folder of session fixtures, where stages write runs/."""
    return Path.cwd()


@pytest.fixture(scope="module")
def folder_of_a_module():
    """Working folder of module fixtures."""
    return Path.cwd()


def test_fixtures_and_tests_work_outside_the_checkout(
    folder_of_a_session, folder_of_a_module, frozen, tmp_path
):
    for folder in (folder_of_a_session, folder_of_a_module, Path.cwd()):
        assert not folder.is_relative_to(ROOT)
    assert Path.cwd() == tmp_path
    # Stages write their runs there, as the store of all tests shows.
    assert list(folder_of_a_session.glob(f"runs/{frozen.config.run}/precompute/cost.json"))


def test_a_group_runs_in_one_process(tmp_path):
    """Two modules on Ray and one that is not, in two processes that pytest-xdist starts."""
    for name, mark in {"a": "ray", "b": "ray", "c": "slow"}.items():
        lines = [
            "import os, pytest",
            f"@pytest.mark.{mark}",
            "@pytest.mark.parametrize('n', range(8))",
        ]
        lines += ["def test_it(n):", f"    open('{tmp_path}/{name}-' + str(os.getpid()), 'w')"]
        (tmp_path / f"test_{name}.py").write_text("\n".join(lines))
    (tmp_path / "conftest.py").write_text(
        "from tests.support.scheduler import ModuleScheduling\n"
        "def pytest_xdist_make_scheduler(config, log): return ModuleScheduling(config, log)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    ray\n    slow\n")
    words = [
        *("-q", "-p", "xdist", "-n2"),
        "--rootdir",
        str(tmp_path),
        "-c",
        str(tmp_path / "pytest.ini"),
        str(tmp_path),
    ]
    subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )

    processes = {p.name.partition("-")[2] for p in tmp_path.glob("[ab]-*")}
    assert len(processes) == len(list(tmp_path.glob("c-*"))) == 1
    assert processes.isdisjoint(p.name.partition("-")[2] for p in tmp_path.glob("c-*"))


def test_the_groups_that_take_longest_are_begun_first(tmp_path, monkeypatch):
    texts = {"a.py": "", "b.py": "pytest.mark.ray", "c.py": "", "d.py": "pytest.mark.ray"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    seconds = {"a.py": 2.0, "b.py": 1.5, "d.py": 1.5, "gone.py": 9.0}
    monkeypatch.setattr("tests.support.scheduler.durations", lambda: seconds)
    items = [SimpleNamespace(nodeid=f"{name}::test") for name in ("a.py", "b.py", "c.py", "d.py")]

    sort_by_durations(tmp_path, items)

    assert [item.nodeid[:4] for item in items] == ["b.py", "d.py", "a.py", "c.py"]


def test_durations_are_the_sums_of_modules_in_junit_files(tmp_path):
    file = tmp_path / "tests.xml"
    cases = [("tests.a.test_b", 0.7), ("tests.a.test_b", 0.75), ("tests.test_c", 0.1)]
    lines = [f'<testcase classname="{name}" time="{time}"/>' for name, time in cases]
    file.write_text(f"<testsuite>{''.join(lines)}</testsuite>")

    assert measured([file]) == {"tests/a/test_b.py": 1.4}  # less than a second is left out
