"""Execution of the unfinished students of a sweep, with progress and errors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from permafrost.core.tasks import RunTasks, Task
    from permafrost.sweep.student import StudentRun

logger = logging.getLogger("permafrost.sweep")


class StudentRunner:
    """Runner of students in parallel. A failed student does not stop the others."""

    def __init__(self, run_tasks: RunTasks, build_task: Callable[[StudentRun], Task]) -> None:
        self.run_tasks = run_tasks
        self.build_task = build_task
        self.done: set[str] = set()
        """Names of the students that were trained or evaluated by this runner."""
        self.errors: list[str] = []

    def finish(self, runs: Sequence[StudentRun]) -> None:
        """Finish each run whose metrics are missing."""
        missing = {run.name: run for run in runs if not run.is_done}
        if not missing:
            return
        total = sum(run.epochs for run in missing.values())
        finished = 0
        with progress("sweep", total=total, unit="epoch") as bar:

            def show(name: str, line: str) -> None:
                state = f"{finished}/{len(missing)} students; {Path(name).name} {line}"
                bar.set_postfix_str(state, refresh=False)
                bar.update(1)

            tasks = [self.build_task(run) for run in missing.values()]
            for outcome in self.run_tasks(tasks, show):
                check_interrupted()
                error = outcome.error or _invisible(missing[outcome.name])
                if outcome.traceback:
                    logger.error("%s failed:", outcome.name)
                    for line in outcome.traceback.splitlines():
                        logger.error("%s", line)
                if error:
                    self.errors.append(f"{outcome.name}: {error}")
                    continue
                finished += 1
                self.done.add(outcome.name)
                logger.info("%s finished (%d of %d)", outcome.name, finished, len(missing))


def _invisible(run: StudentRun) -> str:
    """Return an error message if a task finished but its metrics are not visible here, otherwise an empty string."""
    if run.is_done:
        return ""
    return f"{run.metrics} of the machine that ran it is not visible here; set run= to a folder on shared storage"
