"""Distil and judge many students from one store: every arm with every seed, several side by side.

    python -m stages.sweep experiment=demo
    python -m stages.sweep experiment=demo seeds=[5,6,7] parallel=4
    python -m stages.sweep store.path=stores/demo run=taus \\
        "arms={t1: ['method.tau=1'], t4: ['method.tau=4']}"

Reads   <store.path>
Writes  runs/<run>/students/<arm>-seed<n>-<id>/ as distill and evaluate do, then runs/<run>/sweep.json
Again   a run's id is the hash of its config and of what it reads, so finished runs are skipped
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commandline import compose, main, section_of
from pipeline.config.builder import build_verb_config
from pipeline.distillation import fingerprint_inputs, open_passes
from pipeline.errors import UserError
from pipeline.progress import progress
from pipeline.runs import RUNS, identity, plain
from pipeline.store.files import sha256_json, write_atomically
from pipeline.store.reader import Store
from stages import distill, evaluate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import DistillConfig, EvaluateConfig, SweepConfig

logger = logging.getLogger("permafrost.sweep")

SWEEP_NAME = "sweep.json"
_OWN_SECTIONS = ("arms", "seeds", "parallel", "run")
# Two processes whose OpenMP threads spin for each other's cores run at a fifth of their speed.
_CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


class SweepError(UserError, RuntimeError):
    """Students that could not be finished; the finished ones stay."""


@dataclass(frozen=True, kw_only=True)
class StudentRun:
    """One student of the grid."""

    arm: str
    seed: int
    distill: DistillConfig
    evaluate: EvaluateConfig

    @property
    def is_finished(self) -> bool:
        """Whether it was trained and judged."""
        return (RUNS / self.distill.run / "evaluate" / evaluate.METRICS_NAME).exists()


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """How many students there are, and how many this call trained or judged."""

    students: int
    finished_now: int
    table: str


def run(config: SweepConfig, base: Sequence[str] = ()) -> SweepResult:
    """Finish every student that `base` (the overrides typed) describes for each arm and seed."""
    students = _plan(config, base)
    missing = [student for student in students if not student.is_finished]
    errors = _run_side_by_side(missing, config.parallel) if missing else []
    table = RUNS / config.run / SWEEP_NAME
    finished = [student for student in students if student.is_finished]
    rows = [{"arm": s.arm, "seed": s.seed, "run": s.distill.run} for s in finished]
    write_atomically(table, json.dumps({"runs": rows}, indent=1).encode())
    if errors:
        raise SweepError(
            f"{len(errors)} of {len(students)} students failed, {table} lists the others: "
            + " | ".join(errors)
        )
    return SweepResult(students=len(students), finished_now=len(missing), table=str(table))


def _plan(config: SweepConfig, base: Sequence[str]) -> list[StudentRun]:
    shared = [word for word in base if section_of(word) not in _OWN_SECTIONS]
    students = []
    # Seeds outermost: whatever finishes first is comparable.
    for seed in config.seeds:
        for arm, overrides in config.arms.items():
            composed = compose(
                "sweep", [*shared, "trainer.num_threads=1", *overrides, f"seed={seed}"]
            )
            distill_config: DistillConfig = build_verb_config("distill", composed)
            evaluate_config: EvaluateConfig = build_verb_config("evaluate", composed)
            parts = [identity(plain(c)) for c in (distill_config, evaluate_config)]
            digest = sha256_json([*parts, _fingerprints(distill_config, evaluate_config)])
            name = f"{config.run}/students/{arm}-seed{seed}-{digest[:8]}"
            students.append(
                StudentRun(
                    arm=arm,
                    seed=seed,
                    distill=replace(distill_config, run=name),
                    evaluate=replace(evaluate_config, run=name),
                )
            )
    return students


def _fingerprints(student: DistillConfig, judge: EvaluateConfig) -> list[str]:
    store = Store(Path(student.store.path))
    passes = open_passes(student, store)
    judged_by = evaluate.passes_to_compare(store, judge.store.teacher)
    made_from = fingerprint_inputs(student, store, passes)
    return [*made_from.values(), *(teacher.manifest.fingerprint for teacher in judged_by)]


# ---- side by side --------------------------------------------------------------------------------


def _run_side_by_side(students: list[StudentRun], parallel: int) -> list[str]:
    """Errors, one a failed student."""
    os.environ.update(_CHILD_ENVIRONMENT)  # read by the children when they start
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    total = sum(student.distill.trainer.epochs for student in students)
    with (
        progress("sweep", total=total, unit="epoch") as bar,
        ProcessPoolExecutor(
            min(parallel, len(students)), context, initializer=_initialize_child, initargs=(queue,)
        ) as pool,
    ):
        listener = threading.Thread(
            target=_show_progress, args=(queue, bar, len(students)), daemon=True
        )
        listener.start()
        futures = {pool.submit(_run_student, student): student for student in students}
        errors = []
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None:
                    what = error if isinstance(error, UserError) else repr(error)
                    errors.append(f"{futures[future].distill.run}: {what}")
        except KeyboardInterrupt:
            for process in list(pool._processes.values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            queue.put(None)
            listener.join(timeout=5)
    return errors


_queue: Any = None


def _initialize_child(queue: Any) -> None:
    global _queue
    _queue = queue
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends its children


def _run_student(student: StudentRun) -> None:
    def on_epoch(epoch: int, line: str) -> None:
        _queue.put((student.arm, student.seed, line))

    distill.run(student.distill, on_epoch)
    evaluate.run(student.evaluate)
    _queue.put((student.arm, student.seed, "finished"))


def _show_progress(queue: Any, bar: Any, num_students: int) -> None:
    finished = 0
    while (message := queue.get()) is not None:
        arm, seed, line = message
        if line == "finished":
            finished += 1
            logger.info(
                "%s seed %d finished (%d of %d students)", arm, seed, finished, num_students
            )
        else:
            bar.update(1)
            bar.set_postfix_str(f"{finished}/{num_students} students; {arm} seed {seed} {line}")


if __name__ == "__main__":
    main("sweep", lambda config: run(config, sys.argv[1:]), __doc__)
