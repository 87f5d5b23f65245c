"""A bucket behind a slow network: how many steps wait for records, how fast they are read, and how fast a pass writes.

    .venv/bin/python -m tests.benchmarks object_storage          (about 5 minutes; only if it is named)

A store of raw frames is read in the order of an epoch, with a bucket of moto's server behind a proxy that adds a
latency to each request and limits its bandwidth. A step is a pause of a given time, so that the figures do not depend
on how fast this machine trains. A step has waited if its records came later than those of a local store.

A pass of large features is written with each shard uploaded beside the work on the next one, and before it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from permafrost.config.augment import AugmentOptions
from permafrost.config.store import StoreOptions
from permafrost.core.uploads import collected_uploads
from permafrost.functions import run_verb
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.sampler import WINDOW_SHARDS
from permafrost.loading.subset import rows_of_split
from permafrost.storage import buckets
from permafrost.store.reader import Store
from permafrost_sources.options import DemoDataConfig
from tests.support.networks import save_tiny_teacher
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

RESULTS = Path(__file__).with_name("object_storage.json")
LATENCIES = (0.0, 0.02, 0.1)
BYTES_PER_SECOND = 50e6
EMPTY, FULL, LIMITED = CACHES = ("empty", "full", "two windows")
STEP_SECONDS = 0.05
BATCH = 32
UPLOAD_BYTES_PER_SECOND = 20e6
UPLOAD_LATENCY = 0.02
ROUNDS = 2
_PASS = (
    *("data=demo", "data.image_size=64", "data.train_digits=400", "data.test_digits=4"),
    *("data.test_placements=1", "data.teacher_digits=4", "data.teacher_placements=1"),
    *("store.shard_size=64", "executor=serial", "teacher=cifar", "teacher.name=resnet20"),
    *("teacher.weights=random", "annotate.outputs=[logits,features]"),
    *("annotate.features_dtype=float16", "annotate.batch_size=32"),
)
_WAITED = 0.02
"""Time beyond that of the slowest step of a local store from which a step has waited."""
_DATA = DemoDataConfig(
    image_size=64, train_digits=1400, test_digits=10, teacher_digits=10, max_digit_size=32
)


@dataclass(frozen=True, kw_only=True)
class EpochFigures:
    """Reading of an epoch from a bucket."""

    latency: float
    """Seconds that are added to a request."""
    cache: str
    """Empty or full at the beginning, or empty and limited to two windows of shards."""
    waited: float
    """Fraction of the steps that waited."""
    seconds_waited: float
    """Time of all waiting, as a fraction of the epoch without it."""
    records_per_second: float
    """Without pauses."""
    largest_cache: int
    """Bytes."""


def measure(words: Sequence[str]) -> dict[str, Any]:
    """Measure the epochs of all networks, beside those of a local store."""
    from tests.support.buckets import (  # not in the environment of other readers
        KEYS,
        Network,
        moto_server,
        proxy,
    )

    with tempfile.TemporaryDirectory() as folder, _in_folder(Path(folder)):
        Path("teacher").mkdir()
        teacher = save_tiny_teacher(Path("teacher"))
        precompute.run(
            precompute_config(Path("store"), teacher, data=_DATA, shard_size=32, format="raw")
        )
        local = Store("store")
        pauses = _pauses(local, STEP_SECONDS)
        slowest, plain = max(pauses), [*pauses]
        limit = _smallest_cache(local)
        rows = []
        with moto_server() as server:
            os.environ.update(KEYS | {"AWS_ENDPOINT_URL": server})
            _upload(Path("store"), "s3://bucket/store")
            for latency in LATENCIES:
                with proxy(server, network=Network(latency, BYTES_PER_SECOND)) as address:
                    os.environ["AWS_ENDPOINT_URL"] = address
                    buckets._clients.clear()
                    rows += [_epoch(latency, how, slowest, plain, limit) for how in CACHES]
            uploads = _uploads(server)
        return {
            "records": local.num_records("train"),
            "shards": len(local.shards.splits["train"]),
            "shard_bytes": int(max(local.shards.table["bytes"].to_pylist())),
            "local_records_per_second": _speed(local),
            "cache_bytes": limit,
            "epochs": [asdict(row) for row in rows],
            "uploads": uploads,
        }


def _uploads(server: str) -> dict[str, list[float]]:
    """Measure the seconds of a pass by round, with uploads beside the work on the next shard and after each shard."""
    from tests.support.buckets import Network, proxy

    seconds: dict[str, list[float]] = {"beside": [], "after": []}
    with proxy(server, network=Network(UPLOAD_LATENCY, UPLOAD_BYTES_PER_SECOND)) as address:
        os.environ["AWS_ENDPOINT_URL"] = address
        buckets._clients.clear()
        for number in range(ROUNDS):
            for how, measured in seconds.items():
                collect = nullcontext if how == "after" else collected_uploads
                with patch("permafrost.core.tasks.collected_uploads", collect):
                    started = time.perf_counter()
                    run_verb("precompute", *_PASS, f"store.path=s3://bucket/{how}{number}")
                    measured.append(time.perf_counter() - started)
    return seconds


def _smallest_cache(local: Store) -> int:
    """Return a size that has room for two windows and the index, and not for the whole store."""
    files = sum(file.bytes for file in local.manifest.index.values())
    shard = max(local.shards.table["bytes"].to_pylist())
    (teacher,) = local.open_passes()
    shard += max(sum(file.bytes for file in shard.files) for shard in teacher.shards)
    return files + (2 * WINDOW_SHARDS + 2) * shard


def _epoch(
    latency: float, cache: str, slowest: float, plain: Sequence[float], limit: int
) -> EpochFigures:
    folder, most = Path("cache"), limit if cache == LIMITED else None
    if cache != FULL:
        shutil.rmtree(folder, ignore_errors=True)
    sizes: list[int] = []
    with _watched(folder, sizes):
        pauses = _pauses(_open(folder, most), STEP_SECONDS)
        if cache == EMPTY:
            shutil.rmtree(folder)
        speed = _speed(_open(folder, most))
    waits = [max(pause - slowest, 0.0) for pause in pauses]
    return EpochFigures(
        latency=latency,
        cache=cache,
        waited=sum(wait > _WAITED for wait in waits) / len(plain),
        seconds_waited=sum(waits) / (sum(plain) + len(plain) * STEP_SECONDS),
        records_per_second=speed,
        largest_cache=max(sizes, default=0),
    )


def _open(cache: Path, limit: int | None) -> Store:
    options = StoreOptions(path="s3://bucket/store", cache=str(cache.absolute()), cache_bytes=limit)
    return Store(options.folder)


def _loader(store: Store) -> TrainLoader:
    dataset = StoreDataset(store, rows_of_split(store, "train"), store.open_passes(), keep_bytes=0)
    return TrainLoader(
        dataset, ViewSchedule(AugmentOptions(), store.size, 0), batch_size=BATCH, seed=0
    )


def _pauses(store: Store, step: float) -> list[float]:
    """Return the time for which each step waits for its records."""
    pauses = []
    before = time.perf_counter()
    for _ in _loader(store).epoch(0):
        pauses.append(time.perf_counter() - before)
        time.sleep(step)
        before = time.perf_counter()
    return pauses


def _speed(store: Store) -> float:
    started = time.perf_counter()
    records = sum(len(batch.keys) for batch in _loader(store).epoch(0))
    return records / (time.perf_counter() - started)


def _upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            with path.open("rb") as file:
                name = path.relative_to(folder).as_posix()
                buckets.put_object(f"{address}/{name}", file, path.stat().st_size, "")


@contextmanager
def _watched(cache: Path, sizes: list[int]) -> Iterator[None]:
    """Append the size of the cache from time to time."""
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.05):
            total = 0
            for path in cache.rglob("*"):
                try:
                    total += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue
            sizes.append(total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def load() -> dict[str, Any]:
    """Read the recorded figures."""
    figures: dict[str, Any] = json.loads(RESULTS.read_text())
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """Format the figures as a table."""
    header = (
        "added latency",
        "cache",
        "steps that waited",
        "time waited, of the epoch",
        "records/s without pauses",
        "largest cache",
    )
    rows = [header, ("---",) * len(header)]
    rows += [
        (
            f"{epoch['latency'] * 1000:.0f} ms",
            epoch["cache"],
            f"{epoch['waited']:.0%}",
            f"{epoch['seconds_waited']:.1%}",
            f"{epoch['records_per_second']:,.0f}",
            f"{epoch['largest_cache'] / 1e6:.1f} MB",
        )
        for epoch in figures["epochs"]
    ]
    rows.append(("local store", "", "", "", f"{figures['local_records_per_second']:,.0f}", ""))
    uploads = figures["uploads"]
    header = ("uploads of a pass", "seconds by round", "of those after each shard")
    rows += [(), header, ("---",) * len(header)]
    rows += [
        (
            f"{how} the next shard" if how == "beside" else "after each shard",
            ", ".join(f"{one:.1f}" for one in seconds),
            f"{sum(seconds) / sum(uploads['after']):.2f}",
        )
        for how, seconds in uploads.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" if row else "\n" for row in rows)
