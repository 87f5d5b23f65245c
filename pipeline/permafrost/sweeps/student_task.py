"""The training and the evaluation of one student as a task of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from permafrost.evaluation.evaluate import evaluate_student
from permafrost.runs.folder import RunFolder, mirrored_run
from permafrost.runs.mirrors import RunFiles
from permafrost.storage.addresses import is_address
from permafrost.storage.rooted_paths import RootedPath, rooted
from permafrost.sweeps.runner import StudentRun
from permafrost.training.distill import distill_student


@dataclass(frozen=True)
class StudentTask:
    """Task that distills and evaluates one student, in any process of the task runner."""

    run: StudentRun

    @property
    def name(self) -> str:
        """Name of the student's run."""
        return self.run.name

    @property
    def after(self) -> tuple[str, ...]:
        """Runs with which the student is compared."""
        return self.run.baselines

    @property
    def folder(self) -> RootedPath:
        """Folder of the student, which a task of a job array claims."""
        path = self.name if is_address(self.name) else str(RunFolder(self.name).path)
        run, students, name = path.rsplit("/", 2)
        return rooted(run) / students / name

    def is_done(self) -> bool:
        """Return whether the student is evaluated, here or on another machine."""
        RunFiles(self.name).fetch()
        return self.run.is_done

    def __call__(self, report: Callable[[str], None]) -> None:
        from permafrost.models.compute import torch_threads  # imports torch

        with (
            ExitStack() as stack,
            torch_threads(1),  # the same order of sums in parallel and serial execution
        ):
            for run in (*self.after, self.name):
                stack.enter_context(mirrored_run(run))
            distill_student(self.run.distill, lambda epoch, line: report(line))
            evaluate_student(self.run.evaluate, self.run.metrics_folder)
