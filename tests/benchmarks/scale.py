"""Figures of cost against size: seconds and private memory with few records and with many.

    make bench ARGS=scale
    make bench ARGS="scale_first_batch scale_students"

The figures are not part of the default `make bench`: together they take about an hour and 30 GB of disk. Stores of 14
million records are made from one real shard (large_stores.py), and every figure is taken from commands in processes of
their own (probe.py). Memory is anonymous memory, because the pages of a mapped file are shared by all processes of a
machine and can be dropped at any time.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from permafrost.store.manifest import MANIFEST_NAME
from tests.benchmarks.inputs import write_tars
from tests.benchmarks.large_stores import write_large_store
from tests.support.synthetic import large_store

logger = logging.getLogger("permafrost.bench")

OUT = Path("runs/bench")
RESULTS = Path(__file__).with_name("scale.json")
"""Figures of the last run that was recorded in the repository."""
FEW = 10_240
MILLION = 1_003_520
MANY = 14_197_248
"""ImageNet-21k, rounded up to whole shards."""
_TEST = 5_120
_SIZES = (10_000, 60_000, 1_000_000)
_INDEXED = 100_000_256
_BATCHES = 36
_STUDENTS = 20
_GENERATIONS = 200
_APPENDED = 1_000
"""Records of each of these generations, fewer than a shard has room for."""
_ROUNDS = 5
_NETWORK = ("student=cifar", "student.name=resnet8", "student.width=4", "method=e2kd")
_TEACHER = ("teacher=cifar", "teacher.name=resnet8", "teacher.width=4", "teacher.weights=random")
_TRAINER = ("trainer.batch_size=256", "trainer.epochs=1", "trainer.num_threads=1")


@dataclass(frozen=True, kw_only=True)
class ScaleFigure:
    """Row of the table: a value with few records and with many."""

    name: str
    few: float
    """Value with `num_few` records, nan if only `many` is measured."""
    many: float
    num_few: int
    num_many: int
    unit: str
    limit: str = ""
    """Aim: "<= number" or ">= number" of `compared`."""

    @property
    def compared(self) -> float:
        """Number that the aim is about: many - few, or many / few for a rate, or many alone."""
        if math.isnan(self.few):
            return self.many
        return self.many / self.few if self.unit == "records/s" else self.many - self.few

    @property
    def is_met(self) -> bool:
        """True if the aim is reached."""
        sign, _, limit = self.limit.partition(" ")
        return self.compared <= float(limit) if sign == "<=" else self.compared >= float(limit)


def training_figures(folder: Path) -> list[ScaleFigure]:
    """Seconds to the first batch of distill, and private memory of trainer and loader."""
    values = []
    for name, path in _stores(folder).items():
        words = (f"store.path={path}", "trainer.loader_processes=1", *_NETWORK, *_TRAINER)
        run = f"run={folder / f'run-{name}'}"
        values.append(_probe(f"batches:{_BATCHES}", "distill", *words, run))
    few, many = values
    return [
        _figure("scale_first_batch", few["seconds"], many["seconds"], "s", "<= 3"),
        _figure("scale_trainer", few["trainer_mib"], many["trainer_mib"], "MiB", "<= 50"),
        _figure("scale_loader", few["loader_mib"], many["loader_mib"], "MiB", "<= 50"),
    ]


def verify_figures(folder: Path) -> list[ScaleFigure]:
    """Peak private memory of verify."""
    few, many = (
        _probe("stage", "verify", f"store.path={path}") for path in _stores(folder).values()
    )
    return [
        _figure("scale_verify", few["peak_mib"], many["peak_mib"], "MiB", "<= 50"),
        _figure("scale_verify_seconds", few["seconds"], many["seconds"], "s", ""),
    ]


def evaluate_figures(folder: Path) -> list[ScaleFigure]:
    """Peak private memory of the evaluation of a small split of a large store."""
    stores = _stores(folder)
    run = f"run={folder / 'student'}"
    _probe("stage", "distill", f"store.path={stores['few']}", *_NETWORK, *_TRAINER, run)
    reports = []
    for path in stores.values():
        shutil.rmtree(folder / "student" / "evaluate", ignore_errors=True)
        options = (f"evaluate.store={path}", "evaluate.splits=[test]")
        reports.append(_probe("stage", "evaluate", run, f"store.path={stores['few']}", *options))
    few, many = reports
    return [
        _figure("scale_evaluate", few["peak_mib"], many["peak_mib"], "MiB", "<= 50"),
        _figure("scale_evaluate_seconds", few["seconds"], many["seconds"], "s", ""),
    ]


def idle_figures(folder: Path) -> list[ScaleFigure]:
    """Processor seconds of commands with nothing to do on a store of a million records, and of their imports alone."""
    path, run = folder / "million", f"run={folder / 'student'}"
    write_large_store(path, {"train": MILLION, "test": _TEST})
    store = f"store.path={path}"
    commands = {
        "distill": ("distill", store, *_NETWORK, *_TRAINER, "subset.shots=100", run),
        "evaluate": ("evaluate", store, run, "evaluate.splits=[test]"),
        "report": ("report", store, run),
    }
    for words in commands.values():
        _probe("stage", *words)
    figures = []
    for name, words in commands.items():
        modules = folder / f"{name}.json"
        again = _probe("stage", *words, PROBE_MODULES=str(modules))
        figures.append(
            ScaleFigure(
                name=f"scale_idle_{name}",
                few=float(_python(_IMPORTS, str(modules))),
                many=again["processor_s"],
                num_few=0,
                num_many=MILLION,
                unit="s",
                limit="<= 1",
            )
        )
    return figures


_IMPORTS = """
import importlib, json, sys, time
for name in json.load(open(sys.argv[1])):
    try:
        importlib.import_module(name)
    except Exception:
        pass
print(time.process_time())
"""
"""Script that prints the processor seconds of a new interpreter that imports what a command has imported."""


def students_figures(folder: Path) -> list[ScaleFigure]:
    """Private memory of the last of 20 students that train side by side on one store."""
    path, go = _stores(folder)["many"], folder / "go"
    bare = _probe("bare")["trainer_mib"]
    students, reports = [], []
    for number in range(_STUDENTS):
        words = (f"store.path={path}", *_NETWORK, *_TRAINER, f"run={folder / f'run-{number}'}")
        students.append(_start("batches:8", "distill", *words, PROBE_WAIT=str(go)))
        if number % 2:  # two at a time start on two cores
            reports += [_report_of(student) for student in students[-2:]]
    go.touch()
    for student in students:
        student.wait()
    last = ScaleFigure(
        name="scale_students",
        few=bare,
        many=reports[-1]["trainer_mib"],
        num_few=0,
        num_many=MANY,
        unit="MiB",
        limit="<= 150",
    )
    return [last]


def index_figures(folder: Path) -> list[ScaleFigure]:
    """Seconds to open the index of 100 million records and read 1,000 batches of it, and the private memory."""
    store = large_store(folder / "index", {"train": _INDEXED})
    seconds, mib = json.loads(_python(_READ_INDEX, str(store.path)))
    common = {"num_few": 0, "num_many": _INDEXED, "few": math.nan}
    return [
        ScaleFigure(name="scale_index_open", many=seconds[0], unit="s", **common),
        ScaleFigure(name="scale_index_batches", many=seconds[1], unit="s", **common),
        ScaleFigure(name="scale_index_memory", many=mib, unit="MiB", **common),
    ]


_READ_INDEX = """
import json, sys, time
import numpy as np
from permafrost.store.reader import Store
from tests.benchmarks.probe import private_mib

before, started = private_mib(), time.perf_counter()
index = Store(sys.argv[1]).index
index.take(("label",), np.array([0]))
opened = time.perf_counter() - started
generator = np.random.default_rng(0)
for _ in range(1000):
    start = int(generator.integers(index.num_rows - 8192))
    rows = start + generator.permutation(8192)[:256]
    index.take(("offset", "size", "label", "image_crc32c"), rows)
    index.keys(rows)
print(json.dumps([[opened, time.perf_counter() - started - opened], private_mib() - before]))
"""


def listing_figures(folder: Path) -> list[ScaleFigure]:
    """Peak private memory of a driver that lists and plans records that are not packed yet."""
    few, many = (
        json.loads(_python(_PLAN, str(folder / str(records)), str(records)))
        for records in (FEW, MANY)
    )
    return [
        _figure("scale_plan", few["peak_mib"], many["peak_mib"], "MiB", "<= 400"),
        _figure("scale_plan_seconds", few["seconds"], many["seconds"], "s", ""),
    ]


_PLAN = """
import sys
from pathlib import Path
from tests.benchmarks.listings import plan_records

plan_records(Path(sys.argv[1]), int(sys.argv[2]))
"""


def end_to_end_figures(folder: Path) -> list[ScaleFigure]:
    """Records per second of each command for a million tiny images, and the seconds of a repeated precompute.

    The small sets are measured before and after the large one, as a machine does not keep its speed for half an hour.
    """
    small, medium, large = _SIZES
    before = {n: _end_to_end(folder / f"before-{n}", n) for n in (small, medium)}
    of_large = _end_to_end(folder / "large", large)
    after = {n: _end_to_end(folder / f"after-{n}", n) for n in (small, medium)}
    stages = ("pack", "annotate", "verify", "epoch")
    seconds = {
        n: {stage: (before[n][stage] + after[n][stage]) / 2 for stage in stages}
        for n in (small, medium)
    } | {large: of_large}
    figures = [_rate("scale_end_to_end", stages, seconds, ">= 0.95")]
    for stage in stages:
        name = "scale_verify_records" if stage == "verify" else f"scale_{stage}"
        figures.append(_rate(name, (stage,), seconds))
    again = ScaleFigure(
        name="scale_repeated_precompute",
        few=math.nan,
        many=of_large["again"],
        num_few=0,
        num_many=large,
        unit="s",
        limit="<= 3",
    )
    return [*figures, again]


def _rate(
    name: str, stages: Sequence[str], seconds: Mapping[int, Mapping[str, float]], limit: str = ""
) -> ScaleFigure:
    """Records per second of some commands together, beyond those of the next smaller set.

    The start of a command is not counted so.
    """
    small, medium, large = (sum(seconds[n][stage] for stage in stages) for n in _SIZES)
    return ScaleFigure(
        name=name,
        few=(_SIZES[1] - _SIZES[0]) / (medium - small),
        many=(_SIZES[2] - _SIZES[1]) / (large - medium),
        num_few=_SIZES[1],
        num_many=_SIZES[2],
        unit="records/s",
        limit=limit,
    )


def _end_to_end(folder: Path, records: int) -> dict[str, float]:
    """Seconds of each command on tars of tiny images."""
    tars = write_tars(folder / "tars", records, 8, distinct=64)
    store, run = f"store.path={folder / 'store'}", f"run={folder / 'run'}"
    data = _tars_and_store(tars, folder / "store")
    commands = {
        "pack": ("precompute", *data, "teacher=none"),
        "annotate": ("precompute", *data, *_TEACHER, run),
        "again": ("precompute", *data, *_TEACHER, run),
        "verify": ("verify", store),
        "epoch": ("distill", store, *_NETWORK, *_TRAINER, run),
    }
    return {name: _probe("stage", *words)["seconds"] for name, words in commands.items()}


def growing_figures(folder: Path) -> list[ScaleFigure]:
    """Seconds to pack a million records and some more anew with a teacher, and to append those."""
    records, added = _SIZES[2], _SIZES[0]
    tars = write_tars(folder / "tars", records, 8, distinct=64)
    _grow(folder, tars)
    write_tars(tars, added, 8, distinct=64, first=records)
    appended = _grow(folder, tars)
    shutil.rmtree(folder / "store")
    anew = _grow(folder, tars)
    return [
        ScaleFigure(
            name=f"scale_append_{name}",
            few=anew[value],
            many=appended[value],
            num_few=records + added,
            num_many=added,
            unit=unit,
        )
        for name, value, unit in (("seconds", "seconds", "s"), ("memory", "peak_mib", "MiB"))
    ]


def _grow(folder: Path, tars: Path) -> dict[str, float]:
    """Pack the records of tars that a store has not, and show them to a tiny teacher."""
    words = (*_tars_and_store(tars, folder / "store"), *_TEACHER, f"run={folder / 'run'}")
    return _probe("stage", "precompute", *words, "store.append=true")


def generations_figures(folder: Path) -> list[ScaleFigure]:
    """Costs of a store of one generation and of one with the same records in 200 of them."""
    tars, few, many = folder / "tars", folder / "one", folder / "many"
    for number in range(_GENERATIONS):
        write_tars(tars, _APPENDED, 8, distinct=64, first=number * _APPENDED)
        _probe("stage", "precompute", *_tars_and_store(tars, many), *_TEACHER, "store.append=true")
    _probe("stage", "precompute", *_tars_and_store(tars, few), *_TEACHER)
    opened = [json.loads(_python(_OPEN, str(path))) for path in (few, many)]
    epochs: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        for path, rounds in zip((few, many), epochs, strict=True):
            words = (f"store.path={path}", *_NETWORK, *_TRAINER, f"run={folder / 'run'}")
            rounds.append(_probe("stage", "distill", *words)["seconds"])
            shutil.rmtree(folder / "run")
    records = _GENERATIONS * _APPENDED
    values = {
        "open": ([opened[0][0], opened[1][0]], "s", ""),
        "memory": ([opened[0][1], opened[1][1]], "MiB", ""),
        "epoch": ([records / min(rounds) for rounds in epochs], "records/s", ">= 0.95"),
    }
    return [
        ScaleFigure(
            name=f"scale_generations_{name}",
            few=both[0],
            many=both[1],
            num_few=1,
            num_many=_GENERATIONS,
            unit=unit,
            limit=limit,
        )
        for name, (both, unit, limit) in values.items()
    ]


_OPEN = """
import json, sys, time
import numpy as np
from permafrost.store.reader import Store
from tests.benchmarks.probe import private_mib

before, started = private_mib(), time.perf_counter()
store = Store(sys.argv[1])
(teacher,) = store.open_passes()
store.index.take(("label",), np.array([0]))
teacher.stored_shard(store.shards[len(store.shards) - 1])
print(json.dumps([time.perf_counter() - started, private_mib() - before]))
"""
"""Script that prints the seconds to open a store and its pass, and their private memory."""


def _tars_and_store(tars: Path, store: Path) -> tuple[str, ...]:
    """Options of tars that are packed into a store."""
    data = ("data=webdataset", f"data.path={tars}", "data.reference=never", "executor=serial")
    return (*data, f"store.path={store}")


def repeated_figures(folder: Path) -> list[ScaleFigure]:
    """Seconds of a repeated precompute of CIFAR-10, from the tars in the folder that the variable CIFAR10 names."""
    root = os.environ.get("CIFAR10")
    if root is None:
        logger.info("skipped: set CIFAR10 to a folder of CIFAR-10 as WebDataset tars")
        return []
    words = ("data=webdataset", f"data.path={root}", "executor=serial")
    command = ("precompute", *words, f"store.path={folder / 'cifar10'}", "teacher=none")
    seconds = [_probe("stage", *command)["seconds"] for _ in range(2)]
    again = ScaleFigure(
        name="scale_repeated_cifar10",
        few=math.nan,
        many=seconds[1],
        num_few=0,
        num_many=60_000,
        unit="s",
        limit="<= 3",
    )
    return [again]


GROUPS: dict[Callable[[Path], list[ScaleFigure]], tuple[str, ...]] = {
    training_figures: ("scale_first_batch", "scale_trainer", "scale_loader"),
    students_figures: ("scale_students",),
    evaluate_figures: ("scale_evaluate", "scale_evaluate_seconds"),
    verify_figures: ("scale_verify", "scale_verify_seconds"),
    idle_figures: tuple(f"scale_idle_{name}" for name in ("distill", "evaluate", "report")),
    listing_figures: ("scale_plan", "scale_plan_seconds"),
    end_to_end_figures: (
        "scale_end_to_end",
        "scale_pack",
        "scale_annotate",
        "scale_verify_records",
        "scale_epoch",
        "scale_repeated_precompute",
    ),
    growing_figures: ("scale_append_seconds", "scale_append_memory"),
    generations_figures: tuple(f"scale_generations_{name}" for name in ("open", "memory", "epoch")),
    repeated_figures: ("scale_repeated_cifar10",),
    index_figures: ("scale_index_open", "scale_index_batches", "scale_index_memory"),
}
"""Functions that measure figures, each with the names of the figures that it returns."""


def _stores(folder: Path) -> dict[str, Path]:
    """Stores with few and with many records, made once per run, or once in the folder that BENCH_STORES names."""
    root = Path(os.environ.get("BENCH_STORES", folder.parent / "stores"))
    paths = {name: root / name for name in ("few", "many")}
    for path, records in zip(paths.values(), (FEW, MANY), strict=True):
        if not (path / MANIFEST_NAME).exists():
            write_large_store(path, {"train": records, "test": _TEST})
    return paths


def _figure(name: str, few: float, many: float, unit: str, limit: str) -> ScaleFigure:
    return ScaleFigure(
        name=name, few=few, many=many, num_few=FEW, num_many=MANY, unit=unit, limit=limit
    )


def _start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a probe."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.probe", *words],
        env={**os.environ, **environment, "PROBE_STARTED": str(time.time())},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _report_of(process: subprocess.Popen[str]) -> dict[str, float]:
    """Read the line that a probe prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            report: dict[str, float] = json.loads(line)
            return report
    raise RuntimeError(f"{' '.join(map(str, process.args))} ended without a report")  # type: ignore[arg-type]


def _probe(*words: str, **environment: str) -> dict[str, float]:
    """Run a probe to its end."""
    process = _start(*words, **environment)
    report = _report_of(process)
    process.communicate()
    return report


def _python(script: str, *words: str) -> str:
    """Run a script and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


# ---- table ---------------------------------------------------------------------------------------

TITLES = {
    "scale_first_batch": "`distill`, from the start of the command to the first batch",
    "scale_trainer": "private memory of the training process",
    "scale_loader": "private memory of a loader process",
    "scale_students": "private memory of a network and its optimizer alone, and of the 20th student on one store",
    "scale_evaluate": "private memory of `evaluate` on a split of 5,120 records",
    "scale_evaluate_seconds": "the same, whole command",
    "scale_verify": "private memory of `verify`",
    "scale_verify_seconds": "the same, whole command",
    "scale_plan": "private memory of a driver of `precompute` that lists and plans",
    "scale_plan_seconds": "the same, time",
    "scale_end_to_end": "images of 8 px: pack, annotate with a tiny teacher, verify, one epoch",
    "scale_pack": "of these, packing",
    "scale_annotate": "annotating",
    "scale_verify_records": "verifying",
    "scale_epoch": "an epoch of a tiny student",
    "scale_repeated_precompute": "`precompute` with nothing to do",
    "scale_repeated_cifar10": "the same, CIFAR-10",
    "scale_append_seconds": "packing and annotating 1,010,000 images of 8 px anew, and appending the last 10,000",
    "scale_append_memory": "the same, private memory",
    "scale_generations_open": "opening a store of 200,000 records and its pass: one generation, and 200",
    "scale_generations_memory": "the same, private memory",
    "scale_generations_epoch": "the same, an epoch of a tiny student",
    "scale_idle_distill": "processor time of the imports of `distill` alone, and of the command with nothing to do",
    "scale_idle_evaluate": "the same, `evaluate`",
    "scale_idle_report": "the same, `report`, which writes its page again",
    "scale_index_open": "opening the index alone",
    "scale_index_batches": "1,000 batches of 256 rows of it",
    "scale_index_memory": "private memory for both",
}


def markdown(figures: Sequence[ScaleFigure]) -> str:
    """Markdown table with one row per figure."""
    lines = ["| | few | many | compared | aim |", "|---|---|---|---|---|"]
    lines += [
        f"| {TITLES[f.name]} | {_cell(f.few, f.num_few, f.unit)} | {_cell(f.many, f.num_many, f.unit)} | "
        f"{_compared(f)} | {f.limit} |"
        for f in figures
    ]
    return "\n".join(lines) + "\n"


def _cell(value: float, records: int, unit: str) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.4g} {unit}" + (f" ({records:,})" if records else "")


def _compared(figure: ScaleFigure) -> str:
    if math.isnan(figure.few):
        text = f"{figure.many:,.3g}"
    else:
        text = (
            f"{figure.compared:.3g}" if figure.unit == "records/s" else f"{figure.compared:+,.3g}"
        )
    return f"**{text}**" if figure.limit and figure.is_met else text


def load(path: Path) -> list[ScaleFigure]:
    """Read the figures that a run wrote."""
    lines = json.loads(path.read_text())
    return [ScaleFigure(**{**line, "few": _number(line["few"])}) for line in lines]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main(words: Sequence[str]) -> None:
    """Measure the figures whose names begin with one of the words, and add them to runs/bench/scale.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    found = {f.name: f for f in load(OUT / "scale.json")} if (OUT / "scale.json").exists() else {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_FOLDER")) as folder:
        for number, (measure, names) in enumerate(GROUPS.items()):
            if not any(name.startswith(word) for word in words for name in names):
                continue
            logger.info("measuring %s", ", ".join(names))
            own = Path(folder) / str(number)
            own.mkdir()
            found |= {figure.name: figure for figure in measure(own)}
            ordered = [found[name] for name in TITLES if name in found]
            lines = [{**asdict(f), "few": None if math.isnan(f.few) else f.few} for f in ordered]
            (OUT / "scale.json").write_text(json.dumps(lines, indent=1) + "\n")
            (OUT / "scale.md").write_text(markdown(ordered))
    print((OUT / "scale.md").read_text(), end="")
