"""Folders below runs/ that a report can be asked for."""

from __future__ import annotations

from pathlib import Path

from permafrost.config.runs import RUNS
from permafrost.config.verbs import ReportConfig
from permafrost.core.errors import UserError

_OWN_FILES = {f"report.{kind}" for kind in ("yaml", "html", "json", "csv")}
"""Files of a run that the report itself writes."""
_NAMED = 20
"""Largest number of runs that a message names."""


class UnknownRunError(UserError, ValueError):
    """Report of a run that does not exist."""


def check_run(run: str) -> None:
    """Raise UnknownRunError unless the run has any output, or is the default, for a report of the store alone."""
    if run == ReportConfig.run or _has_output(RUNS / run):
        return
    _remove_own(RUNS / run)
    known = sorted(p.name for p in RUNS.glob("*") if _has_output(p))
    named = ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "")
    raise UnknownRunError(
        f"{RUNS / run} does not exist; the runs in {RUNS.absolute()} are: {named or 'none'}; correct run=, or leave it "
        "out for a report of the store alone"
    )


def _has_output(folder: Path) -> bool:
    return folder.is_dir() and any(path.name not in _OWN_FILES for path in folder.iterdir())


def _remove_own(folder: Path) -> None:
    """Remove what the command line has already written for a misspelled run."""
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir():
        folder.rmdir()
