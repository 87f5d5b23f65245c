"""Precompute on Ray: against the serial twin, between two shards, and by the number of actors; a store as a data set.

Seconds are those of the shards themselves, by a clock that all processes share. They exclude the start of Ray and of
its actors, which a pass pays once: 5 to 60 s.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar
from unittest import mock

from permafrost.cluster.executors import ExecutorChoice
from permafrost.cluster.ray_executor import RayExecutor
from permafrost.cluster.session import ray_session
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.models import CifarModelConfig, ModelConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.tasks import SAMPLE, Executor, SerialExecutor, ShardResult, Subject
from permafrost.store.reader import Store
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import (
    CLASSES,
    SHARD_RECORDS,
    TINY,
    pack,
    precompute_config,
    write_tars,
)
from tests.benchmarks.reading import BATCH
from tests.benchmarks.stand_in import StandInConfig
from tests.support.verbs import precompute

TEACHER = CifarModelConfig(name="resnet20", classes=CLASSES, weights="random")
ACTORS = (1, 2, 4, 8)
TWIN_ROUNDS = 4
TWIN_SHARDS = 4
ACTORS_ROUNDS = 2
SHARDS_PER_ACTOR = 6
"""Shards per actor, the first of which is not measured."""
LATENCY = 0.125
"""Seconds per batch of the stand-in teacher, 2 s per shard: two cores serve eight actors at a tenth of a core each."""


def actors_name(actors: int) -> str:
    """Name of the figure of a number of actors."""
    return f"ray_{actors}_actors_vs_1"


@dataclass
class TimedTask:
    """Task that logs start and end of each shard, in a file of its process.

    After its first shard a process waits until all processes have finished one, so that none works while others start.
    """

    needs_gpu: ClassVar[bool] = True
    subject: ClassVar[Subject] = Subject("", "work")
    task: Any
    folder: Path
    processes: int = 1

    def __call__(self, shard: Any) -> ShardResult:
        started = time.monotonic()
        result: ShardResult = self.task(shard)
        if result.name == SAMPLE:
            return result
        log = self.folder / f"{os.getpid()}.log"
        is_first = not log.exists()
        with log.open("a") as file:
            file.write(f"{started} {time.monotonic()}\n")
        while is_first and len(list(self.folder.glob("*.log"))) < self.processes:
            time.sleep(0.01)
        return result


class TimedPass:
    """Precompute of a packed store whose shards are timed."""

    def __init__(self, store: Path, config: PrecomputeConfig) -> None:
        self.store, self.config = store, config

    def run(self, executor: Executor, processes: int = 1) -> list[list[tuple[float, float]]]:
        """Run the whole pass, and return start and end of each process's shards."""
        shutil.rmtree(self.store / "teachers", ignore_errors=True)
        folder = self.store.parent / "times"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

        map_shards = executor.map_shards

        def timed(task: Any, shards: Any, following: int = 0) -> Iterator[ShardResult]:
            return map_shards(TimedTask(task, folder, processes), shards, following)

        with (
            mock.patch.object(executor, "map_shards", timed),
            mock.patch.object(ExecutorChoice, "for_records", return_value=executor),
        ):
            precompute.run(self.config)
        lines = [path.read_text().splitlines() for path in folder.glob("*.log")]
        times = [[tuple(map(float, line.split())) for line in own] for own in lines]
        assert sum(map(len, times)) == len(Store(self.store).manifest.shards)
        return [sorted((start, end) for start, end in own) for own in times]


def timed_pass(folder: Path, teacher: ModelConfig, shards: int) -> TimedPass:
    """Pack a store of so many shards, and return its pass."""
    store = folder / "store"
    tars = write_tars(folder / "tars", shards * SHARD_RECORDS, 32, distinct=100)
    pack(tars, store)
    return TimedPass(store, precompute_config(tars, store, teacher=teacher))


def twin_figures(folder: Path) -> list[Figure]:
    """Measure one actor against the serial executor, and its idle time between two shards.

    A pass is measured from the end of its first shard to the end of the last.
    """
    timed = timed_pass(folder, TEACHER, TWIN_SHARDS)
    pairs, shares = [], []
    with ray_session(LocalClusterConfig(), cpus=1):
        ray = RayExecutor(LocalClusterConfig())
        sides: dict[str, Executor] = {"ray": ray, "serial": SerialExecutor()}
        for number in range(TWIN_ROUNDS):
            seconds = {}
            for name in sorted(sides, reverse=number % 2 > 0):
                (times,) = timed.run(sides[name])
                seconds[name] = times[-1][1] - times[0][1]
                if name == "ray":
                    shares += _gaps_and_works(times)
            pairs.append((seconds["ray"], seconds["serial"]))
    per_record = {"unit": "ms/record", "scale": 1e3 / ((TWIN_SHARDS - 1) * SHARD_RECORDS)}
    return [
        figure("ray_vs_serial", pairs, faster=True, aim=">= 0.95", **per_record),
        figure("gap_between_shards", shares, faster=False, unit="ms", scale=1e3, aim=""),
    ]


def _gaps_and_works(times: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Seconds between each shard and the one before it, and seconds of the shard itself."""
    return [(start - before, end - start) for (_, before), (start, end) in pairwise(times)]


DATASET_SIDES = {32: 20_000, 224: 2_000}
"""Number of records by the side of their images."""
DATASET_ROUNDS = 5


def dataset_name(side: int) -> str:
    """Name of the figure of images of a side."""
    return f"ray_dataset_{side}px_vs_loader"


def dataset_figures(folder: Path) -> list[Figure]:
    """Measure whole frames and logits by a data set of Ray, of one core that reads, against RecordLoader."""
    import permafrost

    figures = []
    with ray_session(LocalClusterConfig(), cpus=1):
        for side, records in DATASET_SIDES.items():
            tars = write_tars(folder / f"tars-{side}", records, side, distinct=100)
            path = folder / f"store-{side}"
            precompute.run(precompute_config(tars, path, teacher=replace(TINY, input_size=side)))
            loader = permafrost.RecordLoader(
                permafrost.open_store(path).select("train"), batch_size=BATCH
            )
            data = permafrost.ray_dataset(path, split="train", columns=["input", "logits"])

            def read_loader(loader: Any = loader, records: int = records) -> None:
                loader.dataset.keep_bytes = 0
                assert sum(len(batch.images) + 0 * len(batch.logits) for batch in loader) == records

            def read_data(data: Any = data, records: int = records) -> None:
                batches = data.iter_torch_batches(batch_size=BATCH)
                images = (batch["input"].float() / 255 for batch in batches)
                assert sum(map(len, images)) == records

            pairs = in_turn(read_data, read_loader, DATASET_ROUNDS)
            scale = {"unit": "us/record", "scale": 1e6 / records}
            figures.append(figure(dataset_name(side), pairs, faster=True, aim="", **scale))
    return figures


def actors_figures(folder: Path) -> list[Figure]:
    """Measure the speed of n actors against n times the speed of one, with a teacher that only waits."""
    teacher = StandInConfig(classes=CLASSES, latency_seconds=LATENCY)
    passes = {
        actors: timed_pass(folder / str(actors), teacher, actors * SHARDS_PER_ACTOR)
        for actors in ACTORS
    }
    turns: dict[int, list[list[float]]] = {actors: [] for actors in ACTORS}
    with ray_session(LocalClusterConfig(), cpus=max(ACTORS)):
        for number in range(ACTORS_ROUNDS):
            for actors in ACTORS[:: -1 if number % 2 else 1]:
                executor = RayExecutor(LocalClusterConfig(actors=actors))
                turns[actors].append(mean_turns(passes[actors].run(executor, actors)))
    return [
        figure(
            actors_name(actors),
            pair_turns(turns[actors], turns[1]),
            faster=True,
            unit="ms/record",
            scale=1e3 / SHARD_RECORDS,
            aim=">= 0.95",
        )
        for actors in ACTORS[1:]
    ]


def mean_turns(times: list[list[tuple[float, float]]]) -> list[float]:
    """Mean seconds over the processes of each turn after the first: from the end of a shard to that of the next.

    The second turn begins with its shard, because a process waits for the others before it.
    """
    each = []
    for own in times:
        begins = [own[1][0], *(end for _, end in own[1:-1])]
        each.append([end - begin for begin, (_, end) in zip(begins, own[1:], strict=True)])
    return [
        mean(turn) for turn in zip(*each, strict=False)
    ]  # actors may take one shard more or less


def pair_turns(many: list[list[float]], one: list[list[float]]) -> list[tuple[float, float]]:
    """Pair the turns of n actors with those of one actor in the same round."""
    return [
        pair
        for several, single in zip(many, one, strict=True)
        for pair in zip(several, single, strict=False)
    ]
