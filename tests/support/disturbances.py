"""Verbs that are disturbed at seeded random moments, as child processes, and repeated.

A world is a chain of folders, each with what the verbs before have made. A trial copies the folder in which its verb
can run, starts the verb, disturbs it, and runs it again undisturbed. The folder must then have the bytes of one that
was never disturbed, and nothing of the first process may be left.

    Signal  SIGINT, SIGTERM or SIGKILL, to all processes of the verb or to one of a kind, after a fraction of its time
    Fault   the system's answer to a call on a file (file_faults.c), from a fraction of the verb's calls on
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from PIL import Image

from tests.support.processes import StageProcess, alive, descendants, environment, title, wait_until
from tests.support.sweeps import TWO_VARIANTS
from tests.support.trees import all_files

_PHOTOS = ("data=image_folder", "data.path=photos", "store.image_size=32", "store.shard_size=16")
_TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4", "teacher.weights=random")
_PASS = (*_TEACHER, "annotate.batch_size=8", "executor=serial", "data=none", "store.path=store")
_TRAINER = ("trainer.epochs=8", "trainer.batch_size=8", "trainer.num_threads=1")
_STUDENT = ("store.path=store", "student.name=resnet8", "student.width=4", *_TRAINER)
_TEACH = (
    *("store.path=store", *_TEACHER[:3], "teaching.trainer.epochs=8", "executor=serial"),
    *("teaching.split=train", "teaching.trainer.batch_size=8", "teaching.trainer.num_threads=1"),
)
_VIEWS = ("augment=resized_crop_flip_randaugment_erasing", "views=random", "views.count=2")
_NEW = (*_PHOTOS, *_TEACHER, "annotate.batch_size=8")
VERBS: dict[str, tuple[str, ...]] = {
    "precompute": ("precompute", *_NEW, "store.path=store", "executor=serial"),
    "strong views": ("precompute", *_PASS, "annotate.name=strong", *_VIEWS),
    "mixtures": (
        *("precompute", *_PASS, "annotate.name=mixed", "views=random", "views.count=2"),
        "views.mix=[{kind: mixup}]",
    ),
    "two actors": ("precompute", *_NEW, "store.path=ray", "executor=ray", "cluster.actors=2"),
    "array": ("precompute", *_NEW, "store.path=array", "executor=array"),
    "bucket": ("precompute", *_NEW, "store.path={bucket}", "executor=serial"),
    "teach": ("teach", *_TEACH, "run=taught"),
    "teach folds": ("teach", *_TEACH, "run=folds", "teaching.folds=2"),
    "pass of folds": (
        *("precompute", "store.path=store", "data=none", "executor=serial", "teacher=folds"),
        *("teacher.weights=runs/folds/teach", "annotate.name=unseen"),
    ),
    "distill": ("distill", *_STUDENT, "run=one", "method=e2kd", "store.teacher=resnet8"),
    "replay mixtures": (
        *("distill", *_STUDENT, "run=mixed", "method=kd", "mode=replay", "store.teacher=mixed"),
    ),
    "evaluate": ("evaluate", "store.path=store", "run=one", "evaluate.splits=[test]"),
    "sweep": (
        *("sweep", *_STUDENT, TWO_VARIANTS, "seeds=[0]", "executor=serial", "run=grid"),
        "store.teacher=resnet8",
    ),
    "report": ("report", "store.path=store", "run=one"),
    "export": ("export", "store.path=store", "run=one"),
    "verify": ("verify", "store.path=store"),
    "append": ("precompute", *_NEW, "store.path=store", "executor=serial", "store.append=true"),
}
"""Words of the verbs by name, in an order in which they can run after each other."""
ON_RAY = ("two actors",)
_TIMED = ("cost.json", "metrics.jsonl", "report.", ".report.")
"""Beginnings of the names of files whose content depends on the time, and of partial ones, which are kept a minute."""
_SHARED_MEMORY = Path("/dev/shm")
_SECONDS = 300
"""Limit of a verb's time, beyond which it hangs."""


@dataclass(frozen=True)
class Signal:
    """A signal after a fraction of the verb's time, from the moment at which it handles signals."""

    number: signal.Signals
    moment: float
    victim: str = ""
    """Part of the title of the one process that gets it; empty for all of them."""

    def __str__(self) -> str:
        return f"{self.number.name} to {self.victim or 'all'} at {self.moment:.3f}"


@dataclass(frozen=True)
class Fault:
    """An effect of file_faults.c from a fraction of the verb's calls on."""

    effect: str
    moment: float
    root: str = ""
    """Folder below that of the verb whose files it concerns; empty for the whole, absolute elsewhere."""

    def __str__(self) -> str:
        return f"{self.effect} below {self.root or 'the folder'} at {self.moment:.3f}"


@dataclass
class Outcome:
    """Outcome of a disturbed verb and of its repetition."""

    verb: str
    disturbance: Signal | Fault
    codes: list[int]
    """Exit codes of the verb's processes."""
    last_line: str
    """Last line of standard error."""
    faults: list[str] = field(default_factory=list)
    """Texts of what is wrong."""

    @property
    def result(self) -> str:
        """Name the outcome for the table."""
        if self.faults:
            return "wrong"
        code = next((code for code in self.codes if code), 0)
        if isinstance(self.disturbance, Fault):
            return "named" if code else "not affected"
        if not code and self.disturbance.victim:
            return "went on with the same bytes"
        return f"ended with {code}" if code else "had finished"


class World:
    """Folders before and after each verb.

    Args:
        folder: Place of the folders.
        names: Verbs that are to be disturbed.
        bucket: Client of the bucket, for the verb that needs one.
        variables: Variables of the environment of all verbs.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        bucket: Any = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.bucket, self.variables = folder, bucket, variables or {}
        self.before: dict[str, Path] = {}
        self.contents: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        self.calls: dict[tuple[str, str, str], int] = {}
        base = folder / "0"
        write_photos(base / "photos", range(12))
        last = max(list(VERBS).index(name) for name in names)
        for number, name in enumerate(list(VERBS)[: last + 1], start=1):
            if name not in names and name in ("two actors", "array", "bucket", "report", "export"):
                continue  # nothing else needs them
            self.before[name] = base
            base = shutil.copytree(base, folder / str(number))
            if name == "append":
                write_photos(base / "photos", range(12, 18))
            started = time.monotonic()
            for process in self.start(name, base, {}):
                output, errors = process.communicate(_SECONDS)
                assert process.returncode == 0, (name, output, errors)
            self.seconds[name] = time.monotonic() - started
            self.contents[name] = self.content(base)

    def start(self, name: str, place: Path, variables: dict[str, str]) -> list[Any]:
        """Start the processes of a verb, and wait until they handle signals."""
        bucket = f"s3://bucket/{place.name}"
        words = [word.format(bucket=bucket) if "{b" in word else word for word in VERBS[name]]
        temporary = place.parent / f"{place.name}-tmp"
        outputs = place.parent / f"{place.name}-out"
        for folder in (temporary, outputs):
            folder.mkdir(exist_ok=True)
        places = {"TMPDIR": str(temporary), "PERMAFROST_CACHE": f"{temporary}/cache"}
        variables = places | self.variables | variables
        if name in ON_RAY:
            # A new interpreter: Ray starts processes of its own, which inherit the environment of its start. Its
            # sockets need a short path of temporary files.
            del variables["TMPDIR"]
            program = [sys.executable, "-m", "permafrost", *words]
            options = {"cwd": place, "start_new_session": True, "text": True}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started = [subprocess.Popen(program, env=environment() | variables, **options, **pipes)]
        else:
            count = 2 if name == "array" else 1
            started = [
                StageProcess("permafrost", words, place, variables=variables, outputs=outputs)
                for _ in range(count)
            ]
        for process in started:
            wait_until(lambda one=process: one.poll() is not None or _handles_signals(one.pid))
        return started

    def content(self, place: Path) -> dict[str, bytes]:
        """Read all files that do not depend on the time, and the objects of the verb's store in the bucket."""
        made = {
            str(path.relative_to(place)): path.read_bytes()
            for path in all_files(place)
            if not path.name.startswith(_TIMED) and "tensorboard" not in path.parts
        }
        if self.bucket is not None:
            for block in obstore.list(self.bucket, place.name):
                for meta in block:
                    key = meta["path"]
                    if Path(key).name not in (".lock", ".origin.json", "facts.json"):
                        made[key.partition("/")[2]] = bytes(obstore.get(self.bucket, key).bytes())
        return made

    def count_calls(self, name: str, fault: Fault) -> int:
        """Count the calls of an undisturbed verb that a fault would concern."""
        key = name, fault.effect, fault.root
        if key not in self.calls:
            outcome, made = self._disturbed(name, Fault(fault.effect, 2.0, fault.root), sys.maxsize)
            assert not any(outcome.codes), outcome
            assert made or fault.effect == "nolock", f"{name} makes no call that {fault} concerns"
            self.calls[key] = made
        return self.calls[key]

    def trial(self, name: str, disturbance: Signal | Fault) -> Outcome:
        """Disturb a verb, and repeat it."""
        first = 0
        if isinstance(disturbance, Fault) and disturbance.moment:
            first = int(disturbance.moment * self.count_calls(name, disturbance))
        return self._disturbed(name, disturbance, first)[0]

    def _disturbed(self, name: str, disturbance: Signal | Fault, first: int) -> tuple[Outcome, int]:
        place = shutil.copytree(self.before[name], self.folder / "trial")
        if name == "append":
            write_photos(place / "photos", range(12, 18))
        shared, variables = set(_SHARED_MEMORY.iterdir()), {}
        log = self.folder / "calls"
        log.write_bytes(bytes(16))
        if isinstance(disturbance, Fault):
            root = place / disturbance.root
            variables = {"FAULT": disturbance.effect, "FAULT_ROOT": str(root)}
            variables |= {"FAULT_AT": str(first), "FAULT_LOG": str(log)}
        processes = self.start(name, place, variables)
        members = self._disturb(name, processes, disturbance)
        outcome = Outcome(name, disturbance, [], "")
        texts = []
        for process in processes:
            try:
                texts.append(process.communicate(_SECONDS))
            except subprocess.TimeoutExpired:
                outcome.faults.append("hangs")
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                texts.append(process.communicate())
            outcome.codes.append(process.returncode)
        made, failed = np.frombuffer(log.read_bytes(), np.int64)
        self._judge(outcome, texts, int(failed))
        deadline = time.monotonic() + 180  # agents of Ray ask once a minute if they are needed
        while (left := alive(members)) and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome.faults += [f"process left: {title(pid)}" for pid in left]
        if any(outcome.codes):
            for process in self.start(name, place, {}):
                _, errors = process.communicate(_SECONDS)
                if process.returncode:
                    outcome.faults.append(f"repeated: {errors[-1500:]}")
        now, wanted = self.content(place), self.contents[name]
        names = sorted(n for n in {*now, *wanted} if now.get(n) != wanted.get(n))
        outcome.faults += [f"another content: {names}"] if names else []
        names = (path.name for path in set(_SHARED_MEMORY.iterdir()) - shared)
        memory = [name for name in names if not name.startswith("sem.")]  # which others may have
        outcome.faults += [f"shared memory left: {memory}"] if memory else []
        temporary = self.folder / "trial-tmp"
        kept = [str(p.relative_to(temporary)) for p in temporary.glob("*") if p.name != "cache"]
        outcome.faults += [f"temporary files left: {kept}"] if kept and name not in ON_RAY else []
        for folder in (place, temporary, self.folder / "trial-out"):
            shutil.rmtree(folder)
        if self.bucket is not None:
            for block in obstore.list(self.bucket, "trial"):
                for meta in block:
                    obstore.delete(self.bucket, meta["path"])
        return outcome, int(made)

    def _disturb(self, name: str, processes: list[Any], disturbance: Signal | Fault) -> list[int]:
        """Send the signal, and return the ids of all processes of the verb."""
        if isinstance(disturbance, Fault):
            return []
        time.sleep(disturbance.moment * self.seconds[name])
        members = [pid for one in processes for pid in (one.pid, *descendants(one.pid))]
        if disturbance.number != signal.SIGKILL:
            for process in processes:
                process.send_signal(disturbance.number)
            return members
        victims = members
        if disturbance.victim:  # which may be started later

            def of_title() -> list[int]:
                every = [pid for one in processes for pid in (one.pid, *descendants(one.pid))]
                return [pid for pid in every if disturbance.victim in title(pid)]

            wait_until(lambda: of_title() or processes[0].poll() is not None)
            victims = of_title()[:1]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return members

    def _judge(self, outcome: Outcome, texts: list[tuple[str, str]], failures: int) -> None:
        """Compare exit codes and messages with what the disturbance should cause."""
        verb = VERBS[outcome.verb][0]
        for (_, errors), code in zip(texts, outcome.codes, strict=True):
            lines = errors.strip().splitlines() or [""]
            outcome.last_line = lines[-1]
            if "Traceback" in errors:
                outcome.faults.append(f"traceback: {errors[-1500:]}")
            if isinstance(outcome.disturbance, Fault):
                if code not in (0, 1, 2):
                    outcome.faults.append(f"exit code {code}: {errors[-500:]}")
                elif code and not lines[-1].startswith(f"permafrost {verb}: error: "):
                    outcome.faults.append(f"last line: {lines[-1]}")
                elif code and not failures:
                    outcome.faults.append(f"ends without a fault: {lines[-1]}")
                continue
            number = outcome.disturbance.number
            if code == 0 or number == signal.SIGKILL:
                continue
            how, expected = (
                ("terminated", 143) if number == signal.SIGTERM else ("interrupted", 130)
            )
            line = f"permafrost {verb}: {how}; the same command resumes where it stopped"
            if code == -number and "seconds: " in texts[0][0]:
                continue  # it had finished, and its interpreter was about to end
            if code != expected or lines[-1] != line:
                outcome.faults.append(f"exit code {code}, last line: {lines[-1]}")


def write_photos(folder: Path, numbers: range) -> None:
    """Write photographs of two classes and two splits with these numbers."""
    for split in ("train", "test"):
        for number in numbers:
            for label, cls in enumerate(("cat", "dog")):
                path = folder / split / cls / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                random = np.random.default_rng([number, label, split == "test"])
                coarse = random.integers(0, 255, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
                image.save(path, quality=90)


def signals(
    names: Sequence[str], count: int, seed: int, numbers: Sequence[signal.Signals]
) -> Iterator[tuple[str, Signal]]:
    """Draw as many trials, whose verbs and signals take turns."""
    random = np.random.default_rng(seed)
    for trial in range(count):
        number = numbers[trial // len(names) % len(numbers)]
        yield names[trial % len(names)], Signal(number, float(random.uniform()))


def _handles_signals(pid: int) -> bool:
    """Return whether a process has a handler of SIGTERM."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next((line for line in lines if line.startswith("SigCgt")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
