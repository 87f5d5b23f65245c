"""Signals at seeded random moments of every verb, as child processes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support.processes import StageProcess, wait_until
from tests.support.sweeps import TWO_VARIANTS
from tests.support.trees import all_files

_STUDENT = ("student.name=resnet8", "student.width=4", "trainer.epochs=3", "trainer.batch_size=8")
_DATA = (
    *("data=demo", "data.image_size=16", "data.min_digit_size=8", "data.max_digit_size=12"),
    *("data.test_digits=10", "data.train_digits=40", "data.teacher_digits=12"),
    *("data.teacher_placements=1", "data.test_placements=1", "store.shard_size=16"),
)
_TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4")
_STORE = ("store.path=store",)
VERBS: dict[str, tuple[str, ...]] = {
    "precompute": (
        *(*_STORE, *_DATA, *_TEACHER, "executor=serial", "run=made"),
        *("teacher.weights=random", "annotate.batch_size=8"),
    ),
    "teach": (
        *(*_STORE, *_TEACHER, "run=taught", "teaching.split=teacher", "teaching.trainer.epochs=3"),
        *("teaching.trainer.batch_size=8", "teaching.trainer.num_threads=1"),
    ),
    "distill": (*_STORE, *_STUDENT, "trainer.num_threads=1", "run=one", "method=e2kd"),
    "evaluate": (*_STORE, "run=one", "evaluate.splits=[test]"),
    "sweep": (*_STORE, *_STUDENT, TWO_VARIANTS, "seeds=[0]", "executor=serial", "run=grid"),
    "report": (*_STORE, "run=one"),
    "verify": _STORE,
}
"""Words of every verb, in an order in which they can run after each other."""
_TIMED = ("cost.json", "metrics.jsonl")
"""Files whose content depends on the time."""


class Row(NamedTuple):
    """A signal and what became of the verb."""

    verb: str
    signal: str
    moment: float
    """Fraction of the time of an uninterrupted verb, from the moment at which it handles signals."""
    exit_code: int
    message: str
    """Last line of standard error."""
    is_right: bool
    """True if exit code and message are those of the signal, or if the verb had finished before."""
    is_same: bool
    """True if the same command again leaves the same bytes as one that was not interrupted."""


def signal_trials(trials: int, seed: int, folder: Path) -> Iterator[Row]:
    """Interrupt the verbs in turn, each in a copy of the folder in which it can run."""
    random = np.random.default_rng(seed)
    base, references, seconds = folder / "0", {}, {}
    base.mkdir()
    for number, verb in enumerate(VERBS, start=1):
        references[verb] = base
        base = shutil.copytree(base, folder / str(number))
        process = _start(verb, base)
        started = time.monotonic()
        output, errors = process.communicate()
        seconds[verb] = time.monotonic() - started
        assert process.returncode == 0, (verb, output, errors)
    after = {v: folder / str(n) for n, v in enumerate(VERBS, start=1)}
    for trial in range(trials):
        verb = list(VERBS)[trial % len(VERBS)]
        number = (signal.SIGTERM, signal.SIGINT)[trial // len(VERBS) % 2]
        moment = float(random.uniform())
        place = shutil.copytree(references[verb], folder / "trial")
        yield _trial(verb, number, moment, moment * seconds[verb], place, after[verb])
        shutil.rmtree(place)


def _trial(
    verb: str, number: signal.Signals, moment: float, delay: float, place: Path, after: Path
) -> Row:
    process = _start(verb, place)
    time.sleep(delay)
    process.send_signal(number)
    output, errors = process.communicate()
    message = (errors.strip().splitlines() or [""])[-1]
    how, code = ("terminated", 143) if number == signal.SIGTERM else ("interrupted", 130)
    line = f"permafrost {verb}: {how}; the same command resumes where it stopped"
    ended = process.returncode == code and message == line and "Traceback" not in errors
    has_finished = "seconds: " in output and process.returncode in (0, -number)
    again = _start(verb, place)
    _, problems = again.communicate()
    assert again.returncode == 0, (verb, moment, problems)
    return Row(
        verb,
        number.name,
        round(moment, 3),
        process.returncode,
        message,
        ended or has_finished,
        _content(place) == _content(after),
    )


def _start(verb: str, place: Path) -> StageProcess:
    """Start a verb, and wait until it handles signals."""
    process = StageProcess("permafrost", [verb, *VERBS[verb]], place)
    wait_until(lambda: process.poll() is not None or _handles_signals(process.pid))
    return process


def _handles_signals(pid: int) -> bool:
    """Return whether a process has a handler of SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line for line in lines if line.startswith("SigCgt")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _content(folder: Path) -> dict[str, bytes]:
    """Bytes of all files that do not depend on the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in all_files(folder)
        if path.name not in _TIMED
        and "tensorboard" not in path.parts
        and not path.name.startswith(".permafrost-")
    }
