"""Runs under conditions of other machines: a condition that does not hold is an error, and rows are merged."""

import os
import subprocess
import sys

import pytest

from tests import anywhere
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(("umask", "code"), [(0o077, 5), (0o022, 3)])
def test_no_test_runs_where_the_condition_does_not_hold(umask, code):
    words = ["-m", "pytest", "-q", "-n", "0", "-p", "tests.anywhere", "-p", "no:cacheprovider"]

    done = subprocess.run(
        [sys.executable, *words, "tests/support"],  # a folder without tests: exit code 5
        cwd=ROOT,
        env=os.environ | {anywhere.VARIABLE: "umask"},
        umask=umask,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == code, done.stdout + done.stderr
    assert ("the condition umask does not hold" in done.stdout + done.stderr) == (code == 3)


def test_a_run_without_results_is_an_error_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(anywhere, "WORK", tmp_path / "work")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no such option'\nexit 4\n")
    python.chmod(0o755)

    run = anywhere.Run(tmp_path, python=str(python), folder=tmp_path)

    assert anywhere.run_tests("umask", run, []) == "error: pytest ended with 4 (no such option)"


def test_failures_and_errors_of_fixtures_count_as_failed(tmp_path):
    path = tmp_path / "junit.xml"
    cases = (
        '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="a" name="broken"><error/></testcase>'
        '<testcase classname="a" name="left"><skipped/></testcase>'
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")

    outcome = anywhere.read_outcome(path, 7.4)

    assert outcome == anywhere.Outcome(4, 2, 1, 7.4, ("a::bad", "a::broken"))
    assert (
        anywhere.format_row("one-core: one", outcome) == "| one-core: one | 4 | 1 | 2 | 1 | 7 |\n"
    )


def test_rows_of_other_conditions_stay_in_the_page():
    page = f"before\n{anywhere.MARKS[0]}{anywhere.MARKS[1]}\nafter\n"

    first = anywhere.merge_rows(page, {"umask": "| umask: a | 1 |\n"})
    both = anywhere.merge_rows(first, {"one-core": "| one-core: b | 2 |\n"})
    again = anywhere.merge_rows(both, {"umask": "| umask: c | 3 |\n"})

    rows = "| one-core: b | 2 |\n| umask: c | 3 |\n"
    assert again == page.replace(anywhere.MARKS[0], f"{anywhere.MARKS[0]}\n{anywhere.HEAD}{rows}\n")


def test_the_page_has_a_place_for_the_rows_and_names_the_selection():
    page = anywhere.PAGE.read_text()

    assert all(page.count(mark) == 1 for mark in anywhere.MARKS)
    for path in anywhere.SELECTION:
        assert (ROOT / path).exists()
        assert path.rpartition("/")[2] in page
