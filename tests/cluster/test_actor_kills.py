"""Actors that die: a shard is given to new ones, a limited number of times, and the store has the same bytes.

For the second, a session with two actors makes one store after the other until 60 actors have been killed at random
moments for each backend. A store that differs from an undisturbed one is kept, and the files that differ are listed.
"""

import os
import random
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray

from permafrost.cluster.ray_executor import RayExecutor
from permafrost.cluster.session import ray_session
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.store import PassOptions
from permafrost.core.tasks import ShardError, ShardResult, Subject
from permafrost.store.deaths import DEATHS_SUFFIX
from permafrost_sources.options import DemoDataConfig
from tests.support.processes import descendants, title
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes
from tests.support.verbs import precompute

KILLS = 60
DATA = DemoDataConfig(
    image_size=16,
    min_digit_size=8,
    max_digit_size=12,
    test_digits=60,
    train_digits=260,
    teacher_digits=60,
    teacher_placements=1,
    test_placements=1,
)
ACTORS = LocalClusterConfig(actors=2, max_restarts=1000)


class Killer(threading.Thread):
    """Thread that kills a Ray actor of this process inside a shard, at most once per finished shard."""

    def __init__(self, store, seed):
        super().__init__(daemon=True)
        self.store = store
        self.random = random.Random(seed)
        self.kills = 0
        self.stopping = threading.Event()

    def run(self):
        finished = -1
        while not self.stopping.wait(0.01):
            markers = len(list(self.store.rglob("commits/*.parquet")))
            if markers == finished or not list(self.store.rglob(f".*{DEATHS_SUFFIX}")):
                continue
            actors = [pid for pid in descendants(os.getpid()) if "_ShardActor" in title(pid)]
            if not actors or self.stopping.wait(self.random.uniform(0, 0.2)):
                continue
            finished = markers
            try:
                os.kill(self.random.choice(actors), signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.kills += 1

    def stop(self):
        self.stopping.set()
        self.join()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_a_store_whose_actors_are_killed_is_the_same_bytes(
    tmp_path, tiny_teacher, backend, count_trials
):
    config = precompute_config(
        tmp_path / "expected",
        tiny_teacher,
        data=DATA,
        backend=backend,
        annotate=PassOptions(
            batch_size=4, outputs=("logits", "maps", "attention", "class_maps", "pooled")
        ),
        views=RandomViewsConfig(count=2),
        augment=AugmentOptions(operations=(OperationConfig(kind="horizontal_flip"),)),
    )
    precompute.run(config)
    expected = tree_bytes(tmp_path / "expected")
    kills, stores, failed = 0, 0, 0
    started = time.monotonic()
    with ray_session(ACTORS, cpus=2):
        while kills < KILLS:
            path = tmp_path / f"store-{stores}"
            store = replace(config.store, path=str(path))
            disturbed = replace(config, store=store, executor="ray", cluster=ACTORS)
            killer = Killer(path, stores)
            killer.start()
            try:
                while True:
                    try:
                        precompute.run(disturbed)
                        break
                    except ShardError:  # run the same command again, as a user would
                        failed += 1
            finally:
                killer.stop()
            found = tree_bytes(path)
            different = sorted(
                name for name in {*expected, *found} if expected.get(name) != found.get(name)
            )
            assert different == [], f"{path} differs after {killer.kills} kills"
            kills += killer.kills
            stores += 1
    count_trials(f"an actor of Ray, {backend}", {"the same bytes": kills})
    minutes = (time.monotonic() - started) / 60
    print(f"{backend}: {kills} kills, {stores} stores, {failed} commands again, {minutes:.1f} min")


@dataclass
class DieAtOdd:
    """Task that ends its process at odd shards, and leaves a line for each."""

    folder: Path
    needs_gpu = False
    subject = Subject("", "work")

    def __call__(self, shard):
        if shard % 2:
            with (self.folder / str(shard)).open("a") as file:
                file.write("died\n")
            os._exit(1)
        return ShardResult(name=str(shard), records=1, seconds=0.0, report=None)


@dataclass
class Unloadable(DieAtOdd):
    """Task that no other process can load, and which may end it."""

    is_deadly: bool = False

    def __reduce__(self):
        return load_task, (self.is_deadly,)


def load_task(is_deadly):
    if is_deadly:
        os._exit(1)
    raise ImportError("no module named mine")


@pytest.mark.ray
@pytest.mark.slow
def test_a_shard_is_given_to_so_many_new_actors_and_the_others_finish(tmp_path):
    config = LocalClusterConfig(max_restarts=2, cpus_per_actor=0.5)
    executor = RayExecutor(config)
    results, finished = executor.map_shards(DieAtOdd(tmp_path), range(5)), []
    with pytest.raises(
        ShardError, match="2 of 5 shards failed, the first with: 3 processes died at shard 1"
    ):
        finished.extend(result.name for result in results)

    assert sorted(finished) == ["0", "2", "4"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "1": 3 * "died\n",
        "3": 3 * "died\n",
    }

    # Work that cannot be loaded is an error at once, not at each of the shards.
    with pytest.raises(ShardError, match=r"^no actor can do the work: no module named mine \("):
        list(executor.map_shards(Unloadable(tmp_path), range(5)))
    with pytest.raises(ShardError, match=r"^[3-5] processes died, and none has finished a shard"):
        list(executor.map_shards(Unloadable(tmp_path, is_deadly=True), range(5)))

    # A caller that stopped before the end starts no Ray anew.
    results = executor.map_shards(DieAtOdd(tmp_path), [0, 2])
    next(results)
    executor.close()
    results.close()
    assert not ray.is_initialized()
