"""Trials of a cluster of hosts without a shared disk, on this machine (`make test-hosts`).

python -m tests.hosts [--write] [--logs FOLDER] [trial ...]

trial     names of TRIALS in trials.py; all without any. An undisturbed command runs first where one is compared with it
--write   put the rows into docs/concepts/reliability.md, where the rows of other trials stay
--logs    folder of logs and outcomes, in which undisturbed commands are found again; a temporary one without it

It needs root or user namespaces, and says why where it cannot run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.hosts.machines import enclosed, reason_against
from tests.hosts.trials import HANGS, TRIALS, Outcome
from tests.reliability import PAGE, merge_rows, rows_of
from tests.support.paths import ROOT

_MAX_WORDS = 110


def run_trial(name: str, folder: Path) -> Outcome:
    """Run a trial in namespaces of its own, after the undisturbed one of its command, whose bytes the folder keeps."""
    undisturbed = TRIALS[name].command.words[0]
    if name != undisturbed and not (folder / f"{undisturbed}.outcome.json").exists():
        run_trial(undisturbed, folder)
    # A short path, as Ray's sockets require.
    with tempfile.TemporaryDirectory(prefix="pf-", dir="/tmp") as space:
        command = [sys.executable, "-m", "tests.hosts.trials", name, str(folder), space]
        subprocess.run([*enclosed(), *command], cwd=ROOT, check=True)
    return Outcome(**json.loads((folder / f"{name}.outcome.json").read_text()))


def row_of(outcome: Outcome) -> str:
    """Format the row of a trial."""
    codes = ", ".join("none (hangs)" if code == HANGS else str(code) for code in outcome.codes)
    same = outcome.compared - len(outcome.differing)
    said = outcome.said[-1].replace("|", "/") if outcome.said else ""
    said = said if len(said) <= _MAX_WORDS else f"{said[:_MAX_WORDS]} ..."
    return (
        f"| {TRIALS[outcome.trial].says} | {codes} | {outcome.seconds:.0f} "
        f"| {same} of {outcome.compared} | {said} |\n"
    )


def write_row(outcome: Outcome) -> None:
    """Put the row of a trial into the page, in the order of TRIALS."""
    page = PAGE.read_text()
    rows = rows_of(page, "hosts") | {TRIALS[outcome.trial].says: row_of(outcome)}
    ordered = [rows[trial.says] for trial in TRIALS.values() if trial.says in rows]
    PAGE.write_text(merge_rows(page, "hosts", "".join(ordered)))


def run_trials(names: Iterable[str], folder: Path, *, write: bool) -> bool:
    """Run trials, print their rows, and return whether all of them made the same objects."""
    is_good = True
    for name in names:
        try:
            outcome = run_trial(name, folder)
        except subprocess.CalledProcessError:
            print(f"{name}: the trial itself failed, see {folder / name}", flush=True)
            is_good = False
            continue
        print(row_of(outcome), end="", flush=True)
        is_good = is_good and not outcome.differing
        if write:
            write_row(outcome)
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trials", nargs="*", metavar="trial")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--logs", type=Path)
    words = parser.parse_args()
    for name in words.trials:
        if name not in TRIALS:
            parser.error(f"no trial {name}; choose from {', '.join(TRIALS)}")
    if reason := reason_against():
        sys.exit(f"no hosts on this machine: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (words.logs or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        is_good = run_trials(words.trials or TRIALS, folder, write=words.write)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
