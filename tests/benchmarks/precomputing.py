"""Cost of precomputing, relative to the bare loop over the same images that is its lower bound."""

from __future__ import annotations

import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch

from pipeline.cluster import executors
from pipeline.cluster.data import RayDataExecutor
from pipeline.config.cluster import LocalClusterConfig
from pipeline.config.models import CifarModelConfig
from pipeline.core.tasks import ShardResult
from pipeline.models.providers import build_model, freeze
from pipeline.store.frames import decode_frame
from pipeline.store.reader import Store
from stages import precompute
from tests.benchmarks.figures import Figure, figure, in_turn, interval
from tests.benchmarks.inputs import CLASSES, pack, precompute_config, write_tars

RECORDS = 4000
ROUNDS = 5
TEACHER = CifarModelConfig(name="resnet20", classes=CLASSES, weights="random")
BATCH = 64


def precompute_figures(folder: Path) -> list[Figure]:
    """Measure precompute against a bare loop, and GradCAM against logits alone."""
    tars, store = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    pack(tars, store)
    whole, logits = (
        annotator(tars, store, payloads) for payloads in (("logits", "map"), ("logits",))
    )
    per_record = {"unit": "ms/record", "scale": 1e3 / RECORDS}
    return [
        figure(
            "precompute_vs_bare_loop",
            in_turn(whole, lambda: bare_loop(tars), ROUNDS),
            faster=True,
            aim=">= 0.95",
            **per_record,
        ),
        figure(
            "gradcam_vs_logits",
            in_turn(whole, logits, ROUNDS),
            faster=False,
            aim="<= 1.05",
            **per_record,
        ),
    ]


def annotator(tars: Path, store: Path, payloads: tuple[str, ...]) -> Callable[[], Any]:
    """Return a function that runs the whole command on a packed store: source, plan, teacher, commits, manifest."""
    config = precompute_config(tars, store, teacher=TEACHER, payloads=payloads)

    def run() -> None:
        shutil.rmtree(store / "teachers", ignore_errors=True)
        assert precompute.run(config).teacher_records == RECORDS

    return run


@torch.no_grad()
def bare_loop(tars: Path) -> list[torch.Tensor]:
    """Decode and run the forward pass only, without checks, explanations or files."""
    torch.set_num_threads(1)
    model = freeze(build_model(TEACHER, CLASSES))
    logits = []
    frames: list[torch.Tensor] = []
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    frames.append(decode_frame(tar.extractfile(member).read(), (32, 32)))  # type: ignore[union-attr]
                if len(frames) == BATCH:
                    logits.append(model(torch.stack(frames).float() / 255).logits.half())
                    frames = []
    if frames:
        logits.append(model(torch.stack(frames).float() / 255).logits.half())
    assert sum(map(len, logits)) == RECORDS
    return logits


# ---- gap between two shards ----------------------------------------------------------------------


@dataclass
class TimedTask:
    """Task that logs the start and end of each shard, by the clock that all processes share."""

    needs_gpu: ClassVar[bool] = True
    task: Any
    log: Path

    def __call__(self, shard: Any) -> ShardResult:
        started = time.monotonic()
        result: ShardResult = self.task(shard)
        with self.log.open("a") as file:
            file.write(f"{started} {time.monotonic()}\n")
        return result


def gap_figure(folder: Path) -> list[Figure]:
    """Idle time of a Ray actor between two shards, as a share of a shard's own time."""
    tars, store = write_tars(folder / "tars", 3 * RECORDS, 32), folder / "store"
    pack(tars, store)
    log = folder / "times"
    config = precompute_config(tars, store, teacher=TEACHER, executor="ray")
    original = executors.open_executor

    @contextmanager
    def timed(executor: Any, cluster: Any) -> Iterator[Any]:
        with RayDataExecutor(LocalClusterConfig()) as ray:
            yield lambda task, shards: ray(TimedTask(task, log), shards)

    executors.open_executor = timed
    try:
        precompute.run(config)
    finally:
        executors.open_executor = original
    times = sorted(tuple(map(float, line.split())) for line in log.read_text().splitlines())
    assert len(times) == len(Store(store).manifest.shards)
    gaps = [after[0] - before[1] for before, after in pairwise(times)]
    works = [end - start for start, end in times][1:]
    shares = [gap / work for gap, work in zip(gaps, works, strict=True)]
    low, high = interval(shares)
    return [
        Figure(
            name="gap_between_shards",
            ratio=median(shares),
            low=low,
            high=high,
            ours=median(gaps) * 1e3,
            theirs=median(works) * 1e3,
            unit="ms",
            aim="",
            command="make bench ARGS=gap_between_shards",
        )
    ]
