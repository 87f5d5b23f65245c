"""Table of docs/development/testing.md, from the JUnit files that the sessions of noxfile.py leave in .nox/.

python -m tests.outcomes [--write] [condition ...]

condition  names of conditions; without any, all that have a file
--write    write the rows to the page, where rows of other conditions stay as they are
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from tests.conditions import CONDITIONS
from tests.reliability import merge_rows, rows_of
from tests.support.paths import ROOT

PAGE = ROOT / "docs/development/testing.md"
PART = "conditions"
"""Name of the table in the page."""
UNNAMED = "pytest"
"""Name that pytest gives to a suite without one."""


@dataclass(frozen=True)
class Outcome:
    """Counts of one run of the tests."""

    tests: int
    failed: int
    skipped: int
    seconds: float
    said: str = ""
    """Text that the row has in addition, such as versions."""


def read_outcome(path: Path) -> Outcome:
    """Read the counts from a JUnit file of pytest. An error of a fixture counts as a failed test."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    cases = list(suite.iter("testcase"))
    failed = sum(c.find("failure") is not None or c.find("error") is not None for c in cases)
    skipped = sum(c.find("skipped") is not None for c in cases)
    said = suite.get("name", UNNAMED)
    seconds = float(suite.get("time", "nan"))
    return Outcome(len(cases), failed, skipped, seconds, "" if said == UNNAMED else said)


def format_row(name: str, outcome: Outcome) -> str:
    """Format the row of a condition."""
    said = f" ({outcome.said})" if outcome.said else ""
    passed = outcome.tests - outcome.failed - outcome.skipped
    counts = (outcome.tests, passed, outcome.failed, outcome.skipped, round(outcome.seconds))
    numbers = " | ".join(f"{count:,}" for count in counts)
    return f"| {name}: {CONDITIONS[name].text}{said} | {numbers} |\n"


def with_rows(page: str, rows: dict[str, str]) -> str:
    """Replace the rows of these conditions in a page, in the order of CONDITIONS."""
    kept = {cell.partition(":")[0]: row for cell, row in rows_of(page, PART).items()}
    merged = kept | rows
    return merge_rows(page, PART, "".join(merged[name] for name in CONDITIONS if name in merged))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*", metavar="condition")
    words = parser.parse_args()
    files = {name: ROOT / ".nox" / f"{name}.xml" for name in CONDITIONS}
    files = {name: path for name, path in files.items() if path.exists()}
    for name in words.names:
        if name not in files:
            parser.error(f"no outcome of {name}; there are {', '.join(files) or 'none'}")
    names = words.names or files
    rows = {name: format_row(name, read_outcome(files[name])) for name in names}
    sys.stdout.writelines(rows.values())
    if words.write:
        PAGE.write_text(with_rows(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
