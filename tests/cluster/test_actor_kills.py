"""Actors that are killed at random moments, many times in one Ray session: the store has the same bytes.

A session with two actors makes one store after the other until 60 actors have been killed for each backend. A store
that differs from an undisturbed one is kept, and the files that differ are listed.
"""

import os
import random
import signal
import threading
import time
from dataclasses import replace

import pytest

from permafrost.cluster.session import ray_session
from permafrost.config.augment import AugmentOptions, OperationConfig, RandomViewsConfig
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.data import DemoDataConfig
from permafrost.config.store import PassOptions
from permafrost.core.tasks import ShardError
from permafrost.store.deaths import DEATHS_SUFFIX
from stages import precompute
from tests.support.processes import descendants, title
from tests.support.stores import precompute_config
from tests.support.trees import tree_bytes

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
            receipts = len(list(self.store.rglob("receipts/*.parquet")))
            if receipts == finished or not list(self.store.rglob(f".*{DEATHS_SUFFIX}")):
                continue
            actors = [pid for pid in descendants(os.getpid()) if "MapWorker" in title(pid)]
            if not actors or self.stopping.wait(self.random.uniform(0, 0.2)):
                continue
            finished = receipts
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
            batch_size=4, payloads=("logits", "map", "attention", "class_maps", "pooled")
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
