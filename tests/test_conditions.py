"""Runs under conditions of other machines: a condition that does not hold is an error, and rows are merged."""

import json
import os
import sys
from importlib.metadata import version

import pytest

from tests import conditions, outcomes
from tests.support.paths import ROOT
from tests.support.processes import run_program


def nox(folder, *words, **environment):
    """Run nox with a folder of environments and outcomes."""
    return run_program(
        [sys.executable, "-m", "nox", "--envdir", str(folder), *words],
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("umask", "code"), [(0o077, 5), (0o022, 3)])
def test_no_test_runs_where_the_condition_does_not_hold(umask, code):
    words = ["-m", "pytest", "-q", "-n", "0", "-p", "tests.conditions", "-p", "no:cacheprovider"]

    done = run_program(
        [sys.executable, *words, "tests/support"],
        cwd=ROOT,
        env=os.environ | {conditions.VARIABLE: "umask"},
        umask=umask,
    )

    assert done.returncode == code, done.stdout + done.stderr
    assert ("the condition umask does not hold" in done.stdout + done.stderr) == (code == 3)


@pytest.mark.parametrize(
    ("prefix", "text", "holds"),
    [
        (".nox/lowest", f"numpy=={version('numpy')} \\\n    --hash=sha256:0\nabsent==1\n", True),
        (".nox/lowest", "numpy==0.1\n", False),
        (".nox/lowest", f"numpy=={version('numpy')}\npytest[dev]==0.1 ; a == 'b'\n", False),
        (".nox/lowest", "", False),
        (".venv", f"numpy=={version('numpy')}\n", False),
    ],
)
def test_an_environment_must_have_the_versions_of_its_file(
    tmp_path, monkeypatch, prefix, text, holds
):
    path = tmp_path / "requirements.txt"
    path.write_text(text)
    monkeypatch.setattr(sys, "prefix", str(ROOT / prefix))

    assert conditions.has_packages(path) == holds


@pytest.mark.slow
def test_each_condition_has_a_session_with_its_text(tmp_path):
    listed = json.loads(nox(tmp_path, "--list", "--json", "-s", *conditions.CONDITIONS).stdout)

    texts = {each["session"].partition("-3.")[0]: each["description"] for each in listed}
    assert texts == {name: each.text for name, each in conditions.CONDITIONS.items()}


@pytest.mark.slow
def test_a_session_keeps_its_counts_if_the_tests_ran_to_the_end(tmp_path):
    tests = tmp_path / "test_two.py"
    tests.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    words = ("-s", "terminal", "--", "-n0", "-c", "pyproject.toml", str(tests))

    done = nox(tmp_path, *words)

    assert done.returncode == 1, done.stdout + done.stderr
    outcome = outcomes.read_outcome(tmp_path / "terminal.xml")
    assert (outcome.tests, outcome.failed, outcome.skipped) == (2, 1, 0)

    tests.write_text("")  # pytest ends with 5

    assert nox(tmp_path, *words).returncode == 1
    assert not (tmp_path / "terminal.xml").exists()


@pytest.mark.slow
def test_what_the_machine_cannot_provide_is_skipped_with_its_reason(tmp_path):
    done = nox(tmp_path, "-s", "few-files", PATH=str(tmp_path))

    assert done.returncode == 0
    assert "skipped: no prlimit" in done.stderr


def test_failures_and_errors_of_fixtures_count_as_failed(tmp_path):
    path = tmp_path / "junit.xml"
    cases = (
        '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="a" name="broken"><error/></testcase>'
        '<testcase classname="a" name="left"><skipped/></testcase>'
    )
    suite = f'<testsuite name="seed 3" time="7.4">{cases}</testsuite>'
    path.write_text(f"<testsuites>{suite}</testsuites>")

    outcome = outcomes.read_outcome(path)

    assert outcome == outcomes.Outcome(4, 2, 1, 7.4, "seed 3")
    row = "| one-core: one core (seed 3) | 4 | 1 | 2 | 1 | 7 |\n"
    assert outcomes.format_row("one-core", outcome) == row


def test_rows_of_other_conditions_stay_in_the_page():
    before = f"before\n<!-- trials: {outcomes.PART} -->\n\n| condition |\n|---|\n"
    page = f"{before}\nafter\n"

    first = outcomes.with_rows(page, {"umask": "| umask: a | 1 |\n"})
    both = outcomes.with_rows(first, {"one-core": "| one-core: b | 2 |\n"})
    again = outcomes.with_rows(both, {"umask": "| umask: c | 3 |\n"})

    assert again == f"{before}| one-core: b | 2 |\n| umask: c | 3 |\n\nafter\n"


def test_the_page_has_a_place_for_the_rows_and_names_the_selection():
    page = outcomes.PAGE.read_text()

    assert outcomes.with_rows(page, {"one-core": "| new |\n"}).count("| new |\n") == 1
    for path in conditions.SELECTION:
        assert (ROOT / path).exists()
        assert path.rpartition("/")[2] in page
