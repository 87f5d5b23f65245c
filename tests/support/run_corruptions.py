"""Damage in the files of runs: each verb that reads a file names it in one line, and goes on with no other bytes.

`prepare` makes finished and interrupted runs on a small store, and `trials` damages one file after the other and runs
a verb in this process. A trial is

    named      the verb raised one line with the file's name
    unnamed    it raised one line without it
    silent     it went on
    traceback  it raised anything else
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from permafrost.config.distillation import CurveOptions
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.store import StoreOptions
from permafrost.config.teaching import LabelTeachingConfig, TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import UserError
from permafrost.runs.mirrors import RUNS
from permafrost.training import loop
from permafrost_report.options import ReportConfig, ReportOptions
from tests.support.composition import config_of
from tests.support.kills import killed_at
from tests.support.runs import PAD_CROP, distill_config, evaluate_config
from tests.support.stores import Frozen, precompute_config
from tests.support.sweeps import TWO_VARIANTS, run_sweep, sweep_arguments
from tests.support.verbs import distill, evaluate, precompute, report, teach

_TRAINER = TrainerOptions(
    epochs=3,
    batch_size=8,
    num_threads=1,
    log_every_steps=2,
    checkpoint_every_epochs=1,
    keep_checkpoint=True,
)
DAMAGES = ("flip", "flip", "flip", "cut", "empty", "junk", "append", "zeros")
"""Kinds of damage, a flip of a single bit the most frequent."""


class Case(NamedTuple):
    """A file of a run, and a verb that must refuse it."""

    verb: str
    run: str
    file: str
    """Pattern below runs/<run>, the first match of which is damaged."""


class Trial(NamedTuple):
    """Outcome of a verb on a damaged file."""

    case: Case
    damage: str
    outcome: str
    message: str


_RESUMED = ("config.yaml", "checkpoint.pt", "cost.json", "metrics.jsonl")
_NETWORK = ("model.json", "model.safetensors", "config.yaml")
CASES = (
    *(Case("distill", "half", f"distill/{n}") for n in (*_RESUMED, "epochs.json")),
    *(Case("distill", "one", f"distill/{name}") for name in _NETWORK),
    Case("distill", "chosen", "distill/selected-epoch-*.safetensors"),
    *(Case("evaluate", "one", f"distill/{name}") for name in _NETWORK),
    *(Case("evaluate", "one", f"evaluate/{name}") for name in ("config.yaml", "metrics.json")),
    *(Case("teach", "taught-half", f"teach/{name}") for name in _RESUMED),
    *(Case("teach", "taught", f"teach/{name}") for name in (*_NETWORK, "metrics.json")),
    *(Case("precompute", run, f"teach/{n}") for run in ("taught", "folds") for n in _NETWORK[:2]),
    *(Case("teach", "folds", f"teach/{name}") for name in (*_NETWORK, "fold-0/metrics.json")),
    *(Case("teach", "folds-half", f"teach/fold-0/{name}") for name in (*_NETWORK, "metrics.json")),
    *(Case("teach", "folds-half", f"teach/fold-1/{name}") for name in _RESUMED),
    *(
        Case("report", "one", f"distill/{name}")
        for name in ("model.json", "config.yaml", "cost.json", "metrics.jsonl")
    ),
    *(Case("report", "one", f"evaluate/{n}") for n in ("metrics.json", "pictures.safetensors")),
    Case("report", "grid", "sweep.json"),
    *(
        Case("report", "grid", f"students/kd-*/distill/{name}")
        for name in (*_NETWORK, "cost.json", "metrics.jsonl")
    ),
    *(
        Case("sweep", "grid", f"students/kd-*/distill/{name}")
        for name in ("model.json", "config.yaml")
    ),
    *(
        Case("report", "grid", f"students/kd-*/evaluate/{n}")
        for n in ("metrics.json", "pictures.safetensors")
    ),
    Case("report", "grid", "students/kd-*/evaluate/records.parquet"),
    Case("report", "grid", "students/kd-*/evaluate/config.yaml"),
    *(
        Case("sweep", "grid", f"students/kd-*/evaluate/{n}")
        for n in ("metrics.json", "config.yaml")
    ),
)


class Runs:
    """Runs in a folder on a small store, and the verbs that read them."""

    def __init__(self, frozen: Frozen, folder: Path) -> None:
        self.frozen, self.folder = frozen, folder
        curve = CurveOptions(splits=("test",), every_epochs=1)
        chosen = {"curve": curve, "select_epoch": "test.accuracy", "trainer": _TRAINER}
        self.distill = {
            "one": distill_config(frozen, run="one", curve=curve),
            "half": distill_config(frozen, run="half", **chosen),
            "chosen": distill_config(frozen, run="chosen", **chosen),
        }
        self.teach = {
            run: self._teach_config(run, folds=2 * run.startswith("folds"))
            for run in ("taught", "taught-half", "folds", "folds-half")
        }
        self.sweep = sweep_arguments(frozen, TWO_VARIANTS, "evaluate.num_pictures=2")

    def _teach_config(self, run: str, folds: int) -> TeachConfig:
        return TeachConfig(
            store=StoreOptions(path=str(self.frozen.store.path)),
            teacher=replace(self.frozen.config.teacher, weights=None),
            teaching=LabelTeachingConfig(
                split="teacher", augment=PAD_CROP, trainer=_TRAINER, folds=folds
            ),
            evaluate=EvaluateOptions(splits=("test",)),
            executor="serial",
            run=run,
        )

    def prepare(self) -> None:
        """Make all runs in the present folder."""
        for run in ("one", "chosen"):
            distill.run(self.distill[run])
        (RUNS / "chosen/distill/model.json").unlink()  # as after a kill before it was written
        teach.run(self.teach["taught"])
        teach.run(self.teach["folds"])
        with killed_at(loop, "train_step", 7):  # in the second of three epochs
            distill.run(self.distill["half"])
        with killed_at(loop, "train_step", 2):  # after the first of three epochs, each of one step
            teach.run(self.teach["taught-half"])
        with killed_at(loop, "train_step", 5):  # in the second fold, after the first of its epochs
            teach.run(self.teach["folds-half"])
        self.verb("evaluate", "one")
        self.verb("sweep", "grid")

    def verb(self, verb: str, run: str) -> Any:
        """Run a verb on a run of the present folder."""
        if verb == "distill":
            return distill.run(self.distill[run])
        if verb == "evaluate":
            return evaluate.run(evaluate_config(self.frozen, run=run, splits=("test",)))
        if verb == "teach":
            return teach.run(self.teach[run])
        if verb == "sweep":
            return run_sweep(self.sweep)
        if verb == "precompute":
            weights = str(RUNS / run / "teach/model.safetensors")
            teacher = replace(self.frozen.config.teacher, weights=weights)
            if run == "folds":
                teacher = config_of(verb, "teacher=folds", f"teacher.weights={weights}").teacher
            return precompute.run(precompute_config(Path("store"), teacher))
        options = ReportOptions(contact_records=0, cases=1, baseline="kd", candidate="e2kd")
        return report.run(
            ReportConfig(
                store=StoreOptions(path=str(self.frozen.store.path)),
                augment=PAD_CROP,
                report=options,
                run=run,
            )
        )


def trials(
    runs: Runs, cases: Sequence[Case], random: np.random.Generator, place: Path
) -> Iterator[Trial]:
    """Damage the file of each case in a copy of its run and run its verb.

    place  folder for the copies
    """
    for number, case in enumerate(cases):
        folder = place / str(number)
        shutil.copytree(
            runs.folder / RUNS / case.run,
            folder / RUNS / case.run,
            ignore=shutil.ignore_patterns("tensorboard"),
        )
        path = min((folder / RUNS / case.run).glob(case.file))
        kinds = list(DAMAGES)
        if case.run.endswith("half") and path.name == "metrics.jsonl":
            # What follows the lines of the checkpoint, of one epoch, is dropped as the rest of a killed run.
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(x for x in lines if '"epoch": 0,' in x))
            kinds.remove("append")
        damage = damage_file(path, random, str(random.choice(kinds)))
        before = Path.cwd()
        os.chdir(folder)
        try:
            outcome, message = attempt(partial(runs.verb, case.verb, case.run), path.name)
        finally:
            os.chdir(before)
            shutil.rmtree(folder)
        yield Trial(case, damage, outcome, message)


def attempt(call: Callable[[], Any], name: str) -> tuple[str, str]:
    """Return the outcome of a call, and its message. An operating system's error is one line of the command line."""
    try:
        call()
    except (UserError, OSError) as error:
        one_line = "\n" not in str(error)
        return ("named" if name in str(error) and one_line else "unnamed"), str(error)
    except Exception as error:
        return "traceback", repr(error)
    return "silent", ""


def damage_file(path: Path, random: np.random.Generator, kind: str) -> str:
    """Damage a file at a random place, and describe how."""
    data = bytearray(path.read_bytes())
    place = int(random.integers(len(data)))
    if kind == "flip":
        data[place] ^= 1 << int(random.integers(8))
    elif kind == "cut":
        del data[place:]
    elif kind == "empty":
        data.clear()
    elif kind == "junk":
        data[:] = random.bytes(len(data))
    elif kind == "append":
        data += data[:place] or b"\0"
    else:
        place = next(p for p in range(place, -1, -1) if data[p])
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    path.write_bytes(data)
    return f"{kind} at {place}"
