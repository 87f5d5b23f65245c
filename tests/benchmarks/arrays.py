"""Job arrays: two tasks against one with a teacher that only waits, and what claims cost a shard of many."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from permafrost.annotation import teacher_pass
from permafrost.cluster.array_executor import ArrayExecutor
from permafrost.config.cluster import LocalClusterConfig
from permafrost.core.tasks import Executor, SerialExecutor, ShardResult, Subject
from permafrost.storage.rooted_paths import rooted
from permafrost.store.commit_markers import MARKER_SUFFIX
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, pack, precompute_config, write_tars
from tests.benchmarks.on_ray import LATENCY
from tests.benchmarks.stand_in import StandInConfig
from tests.support.verbs import precompute

PASS_SHARDS, MANY_SHARDS = 24, 2000
ROUNDS = 3
NAMES = ("array_2_tasks_vs_1", "array_claims_of_2000_shards")


@dataclass
class WriteMarkers:
    """Task that writes a file for each shard, and nothing else."""

    needs_gpu: ClassVar[bool] = False
    subject: ClassVar[Subject] = Subject("", "work")
    folder: Any

    def marker(self, shard: Any) -> Any:
        return self.folder / f"{shard.name}{MARKER_SUFFIX}"

    def is_done(self, shard: Any) -> bool:
        return (Path(str(self.folder)) / f"{shard.name}{MARKER_SUFFIX}").exists()

    def __call__(self, shard: Any) -> ShardResult[None]:
        Path(str(self.marker(shard))).write_bytes(b"")
        return ShardResult(name=shard.name, records=1, seconds=0.0, report=None)


def array_figures(folder: Path) -> list[Figure]:
    """Measure the shards of two tasks against those of one, and many empty shards against the serial executor."""
    tars = write_tars(folder / "tars", PASS_SHARDS * 256, 32, distinct=64, per_tar=256)
    pack(tars, folder / "store")
    teacher = StandInConfig(classes=CLASSES, latency_seconds=LATENCY)
    config = precompute_config(tars, folder / "store", teacher=teacher)

    def seconds_of_pass(tasks: int) -> float:
        shutil.rmtree(folder / "store/teachers", ignore_errors=True)
        parts = [LocalClusterConfig(part=f"{number + 1}/{tasks}") for number in range(tasks)]
        options = [{**vars(config), "executor": "array", "cluster": part} for part in parts]
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(
                target=_timed_pass, args=(type(config)(**each), folder / f"{number}.log")
            )
            for number, each in enumerate(options)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        times = [
            [*map(float, (folder / f"{number}.log").read_text().split())] for number in range(tasks)
        ]
        return max(end for _, end in times) - min(start for start, _ in times)

    def write_markers(executor: Executor) -> None:
        shutil.rmtree(folder / "pass", ignore_errors=True)
        (folder / "pass/commits").mkdir(parents=True)
        task = WriteMarkers(rooted(str(folder / "pass")) / "commits")
        shards = [SimpleNamespace(name=f"train-{number:06d}") for number in range(MANY_SHARDS)]
        assert len(list(executor.map_shards(task, shards))) == MANY_SHARDS

    array = ArrayExecutor(LocalClusterConfig(part="1/2"))
    rounds = range(ROUNDS)
    measured = {
        NAMES[0]: ([(seconds_of_pass(2), seconds_of_pass(1)) for _ in rounds], True, PASS_SHARDS),
        NAMES[1]: (
            in_turn(
                partial(write_markers, array), partial(write_markers, SerialExecutor()), ROUNDS
            ),
            False,
            MANY_SHARDS,
        ),
    }
    return [
        figure(
            name,
            pairs,
            faster=faster,
            unit="ms/shard",
            scale=1e3 / shards,
            aim=">= 1.9" if faster else "",
        )
        for name, (pairs, faster, shards) in measured.items()
    ]


def _timed_pass(config: Any, log: Path) -> None:
    """Run a pass in a process of its own, and write when its first shard began and when it knew that all are done."""
    run_shards = teacher_pass.run_shards

    def timed(*words: Any) -> Any:
        started = time.monotonic()
        result = run_shards(*words)
        log.write_text(f"{started} {time.monotonic()}")
        return result

    teacher_pass.run_shards = timed
    precompute.run(config)
