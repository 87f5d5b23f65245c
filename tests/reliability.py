"""Tables of docs/concepts/reliability.md: damage, attacks, signals and kills, counted by the tests that cause them.

    python -m tests.reliability                    run all of them, which takes an hour on two cores, and print the rows
    python -m tests.reliability stores links       run some parts
    python -m tests.reliability --write            also put the rows into docs/concepts/reliability.md
    make test-all ARGS=--junitxml=all.xml && python -m tests.reliability --read all.xml
                                                   run nothing, and take the rows of an earlier run; of several
                                                   reports, the last one that has a test counts

A test reports its trials with the fixture `count_trials`. The parts are run one after the other, each in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

PAGE = ROOT / "docs/concepts/reliability.md"
PARTS = {
    "stores": ["tests/store/test_corruption.py"],
    "runs": ["tests/training/test_run_files.py"],
    "edits": ["tests/test_hand_edits.py"],
    "links": ["tests/store/test_links.py"],
    "sizes": ["tests/store/test_bombs.py"],
    "exchange": ["tests/exchange/test_hostile_shares.py"],
    "disturbances": ["tests/stages/test_disturbances.py"],
    "buckets": ["tests/store/test_bucket_faults.py"],
    "kills": [
        *("tests/cluster/test_actor_kills.py", "tests/cluster/test_kill.py"),
        *("tests/cluster/test_jobs.py", "tests/cluster/test_array.py"),
    ],
    "fuzzing": ["tests/test_fuzz.py", "tests/store/test_stateful.py"],
}


class Trials(NamedTuple):
    """Trials of one kind and what came of them."""

    kind: str
    outcomes: dict[str, int]
    seconds: float | None
    """Seconds of the slowest trial; None if they are not measured."""
    megabytes: float | None
    """Memory of the largest trial above that of the same command on sound files; None if it is not measured."""

    def with_more(self, other: Trials) -> Trials:
        """Add the outcomes of more trials of this kind, which are not measured."""
        outcomes = Counter(self.outcomes)
        outcomes.update(other.outcomes)
        return self._replace(outcomes=dict(outcomes))

    def row(self) -> str:
        """Format the row of the table."""
        number = sum(self.outcomes.values())
        outcomes = ", ".join(f"{count:,} {name}" for name, count in self.outcomes.items() if count)
        seconds = "" if self.seconds is None else f"{self.seconds:.2f}"
        megabytes = "" if self.megabytes is None else f"{self.megabytes:,.0f}"
        return f"| {self.kind} | {number:,} | {outcomes} | {seconds} | {megabytes} |\n"


def run_part(part: str) -> tuple[list[Trials], bool]:
    """Run the tests of a part, and return its trials and whether all of them passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-n0", "-m", "slow or not slow", f"--junitxml={report}", *PARTS[part]]
        subprocess.run(
            [sys.executable, "-m", "pytest", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=sys.stderr,
            check=False,
        )
        return read_part(part, [report])


def read_part(part: str, reports: list[Path]) -> tuple[list[Trials], bool]:
    """Read the trials of a part from pytest's reports, and whether it ran and nothing of it failed."""
    modules = {path.removesuffix(".py").replace("/", ".") for path in PARTS[part]}
    # A test outside a class has its module as its class.
    every = (case for path in reports for case in ElementTree.parse(path).iter("testcase"))
    of_part = (case for case in every if case.get("classname") in modules)
    cases = list({(case.get("classname"), case.get("name")): case for case in of_part}.values())
    by_kind: dict[str, Trials] = {}
    for element in (each for case in cases for each in case.iter("property")):
        if element.get("name") == "trials":
            trials = Trials(**json.loads(element.get("value", "")))
            kind = trials.kind
            by_kind[kind] = by_kind[kind].with_more(trials) if kind in by_kind else trials
    has_failed = any(case.find(word) is not None for case in cases for word in ("failure", "error"))
    return list(by_kind.values()), bool(cases) and not has_failed


def _table(part: str) -> str:
    """Return the pattern of a part's table in the page: its head, then its rows."""
    return rf"(<!-- trials: {part} -->\n\n(?:\|.*\n){{2}})((?:\|.*\n)*)"


def merge_rows(page: str, part: str, rows: str) -> str:
    """Replace the rows of a part in the page."""
    return re.sub(_table(part), lambda found: found[1] + rows, page)


def rows_of(page: str, part: str) -> dict[str, str]:
    """Return the rows of a part in the page by their first cells."""
    table = re.search(_table(part), page)
    rows = table[2].splitlines(keepends=True) if table else []
    return {row.split("|")[1].strip(): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part")
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--read", type=Path, action="append", help="a report of pytest, in JUnit's form"
    )
    words = parser.parse_args()
    for part in words.parts:
        if part not in PARTS:
            parser.error(f"no part {part}; choose from {', '.join(PARTS)}")
    is_good = True
    for part in words.parts or PARTS:
        trials, passed = read_part(part, words.read) if words.read else run_part(part)
        is_good = is_good and passed
        rows = "".join(each.row() for each in trials)
        print(f"{part}: {'passed' if passed else 'FAILED'}\n{rows}", flush=True)
        if words.write and passed:
            PAGE.write_text(merge_rows(PAGE.read_text(), part, rows))
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
