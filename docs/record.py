"""Write the committed results of an experiment from its report.

    python -m docs.record runs/ked/cifar10/report.json ked/cifar10 --machine "2 cores, one thread a student" \\
        --chosen-on "nothing: the defaults of method=ked"
    python -m docs.record runs/ked/digits-hint/report.json ked/digits_hint --machine "2 cores, one thread a student" \\
        --command "permafrost sweep experiment=ked/digits run=ked/digits-hint"

Writes  conf/experiment/<experiment>.results.json: the command, the machine, on what the options were chosen, and from
        the report the teacher, one row per student, the networks and the passes.
        `python -m docs.tables` reads it. chosen_on of an earlier measurement and keys that were added by hand stay, and
        are to be checked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from docs.measured import path_of

KEYS = ("teacher", "runs", "networks", "passes")
DIGITS = 5


def committed_results(
    report: dict[str, Any], command: str, machine: str, chosen_on: str
) -> dict[str, Any]:
    """Select the results that are committed. A row leaves out the columns of which its student has no value.

    chosen_on  records, seeds and values by which the options were chosen, or that nothing was

    Raises ValueError if the report has no evaluated student.
    """
    if not report.get("runs"):
        raise ValueError(
            "the report has no evaluated students; run permafrost evaluate, then permafrost report"
        )
    kept = {key: _rounded(report[key]) for key in KEYS if report.get(key)}
    return {"command": command, "machine": machine, "chosen_on": chosen_on, **kept}


def one_row_a_line(results: dict[str, Any]) -> str:
    """Format results as JSON with one line per row, so that a new measurement has a readable difference."""
    return (
        "{\n" + ",\n".join(f" {json.dumps(k)}: {_value(v)}" for k, v in results.items()) + "\n}\n"
    )


def _value(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
    return f"[\n{rows}\n ]"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.json of the run")
    parser.add_argument("experiment", help="experiment whose results these are, as in ked/cifar10")
    parser.add_argument("--machine", required=True, help="cores, accelerator and threads, in words")
    parser.add_argument("--command", help="command of the sweep, by default that of the experiment")
    parser.add_argument(
        "--chosen-on", help="on what the options were chosen, by default as committed before"
    )
    options = parser.parse_args()
    command = options.command or f"permafrost sweep experiment={options.experiment}"
    report = json.loads(options.report.read_text())
    path = path_of(options.experiment)
    before = json.loads(path.read_text()) if path.exists() else {}
    chosen_on = options.chosen_on or before.get("chosen_on")
    if chosen_on is None:
        parser.error(f"--chosen-on is missing: say on what the options of {path.name} were chosen")
    try:
        results = committed_results(report, command, options.machine, chosen_on)
    except ValueError as error:
        parser.error(f"{options.report}: {error}")
    by_hand = {key: value for key, value in before.items() if key not in (*results, *KEYS)}
    path.write_text(one_row_a_line(results | by_hand))


if __name__ == "__main__":
    main()
