"""Seconds of each test module, by which two processes are given the longest modules first.

    make test ARGS=--junitxml=build/tests.xml
    python -m tests.durations build/tests.xml    # writes tests/durations.json

Modules of less than a second are left out.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

FILE = Path(__file__).with_suffix(".json")


def durations() -> dict[str, float]:
    """Return the seconds of modules by their path, as they were last written."""
    return json.loads(FILE.read_text())


def measured(paths: list[Path]) -> dict[str, float]:
    """Return the seconds of the modules in JUnit files, the longest first."""
    seconds: Counter[str] = Counter()
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            name = case.get("classname", "").replace(".", "/")
            seconds[f"{name}.py"] += float(case.get("time", 0))
    return {name: round(value, 1) for name, value in seconds.most_common() if value >= 1}


if __name__ == "__main__":
    FILE.write_text(json.dumps(measured([Path(word) for word in sys.argv[1:]]), indent=1) + "\n")
