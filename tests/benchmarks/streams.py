"""The stream of a store against other readers of the same records (peers.py).

equal  the same bytes, decoder, output and number of processes, with one thread in each
best   every side in its fastest way: a peer with its own decoder if that is faster than the store's. One worker is this
       process or one loader process, and two of the store are two loader processes or two decoding threads
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from permafrost.config.augment import AugmentOptions
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import decode_maps
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.store.frames import decode_frame
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.tars import ShardBytes
from stages import precompute
from tests.benchmarks.figures import Figure, against_best, in_rounds, seconds
from tests.benchmarks.inputs import CLASSES, precompute_config, write_tars
from tests.benchmarks.peer import BATCH, Batches, Sample
from tests.benchmarks.peers import PEERS, require_peers
from tests.benchmarks.stand_in import StandInConfig

OURS = "ours"
AIMS = {"equal": ">= 1.0", "best": ">= 1.2"}
WORKERS = (1, 2)
ROUNDS = 6
RECORDS = {32: 4_000, 224: 1_000}
"""Records of an epoch, by the side of the images in pixels."""

Way = Callable[[], Batches]
"""Function that opens a side's records for epochs."""


def name_stream(kind: str, side: int, workers: int) -> str:
    """Name of a figure."""
    return f"stream_{kind}_{side}px_{workers}_worker{'s' if workers > 1 else ''}"


def stream_names(side: int) -> tuple[str, ...]:
    """Names of the figures of one size."""
    return tuple(name_stream(kind, side, workers) for kind in AIMS for workers in WORKERS)


def streams_32_figures(folder: Path) -> list[Figure]:
    """Measure small images, where the reader's own work takes as long as decoding."""
    return _figures(folder, 32)


def streams_224_figures(folder: Path) -> list[Figure]:
    """Measure photographs, where decoding takes most of the time."""
    return _figures(folder, 224)


def _figures(folder: Path, side: int) -> list[Figure]:
    require_peers()
    torch.set_num_threads(1)
    files = Files(folder, side, RECORDS[side])
    return [measure(files, kind, workers, ROUNDS) for kind in AIMS for workers in WORKERS]


class Files:
    """The same records as a store and in the formats of all peers."""

    def __init__(self, folder: Path, side: int, records: int) -> None:
        self.side, self.records = side, records
        tars, path = write_tars(folder / "tars", records, side), folder / "store"
        teacher = StandInConfig(classes=CLASSES)
        precompute.run(precompute_config(tars, path, teacher=teacher))
        self.store = Store(path)
        (self.teacher,) = self.store.open_passes()
        self.folders = {peer.title: folder / peer.package for peer in PEERS}
        self.own_folders: dict[str, Path] = {}
        for peer in PEERS:
            peer.write(self.folders[peer.title], samples(self.store, self.teacher))
            own = folder / f"{peer.package}-own"
            if peer.write_its_way(own, samples(self.store, self.teacher)):
                self.own_folders[peer.title] = own

    def ways(self, kind: str, workers: int) -> dict[str, list[Way]]:
        """Ways of each side to read, of which the fastest is measured."""
        processes = [workers]
        if workers == 1:
            processes = [0] if kind == "equal" else [0, 1]
        ours = [partial(StoreBatches, self, n) for n in processes]
        if kind == "best" and workers > 1:
            ours.append(partial(StoreBatches, self, 0, threads=workers))
        ways: dict[str, list[Way]] = {OURS: list(ours)}
        decode = partial(decode_frame, size=(self.side, self.side))
        for peer in PEERS:
            folder = self.folders[peer.title]
            ways[peer.title] = [partial(peer.load, folder, n, decode) for n in processes]
            if kind == "best" and peer.title in self.own_folders:
                own = self.own_folders[peer.title]
                ways[peer.title] += [partial(peer.load_its_way, own, n) for n in processes]
        return ways


def samples(store: Store, teacher: TeacherPass) -> Iterator[Sample]:
    """Iterate over the stored records."""
    for number, shard in enumerate(store.shards):
        rows = store.rows_of_shard(number)
        columns = store.index.take(("offset", "size", "image_crc32c"), rows)
        places = zip(*(column.tolist() for column in columns.values()), strict=True)
        file, values = ShardBytes(store.path, shard), teacher.read_shard(shard)
        for row, (place, key) in enumerate(zip(places, store.index.keys(rows), strict=True)):
            yield Sample(file.read(*place, key), values["logits"][row, 0], values["map"][row, 0])


class StoreBatches:
    """Epochs of the store, as a training reads them."""

    def __init__(self, files: Files, processes: int, *, threads: int = 1) -> None:
        self.dataset = StoreDataset(
            files.store,
            rows_of_split(files.store.index, "train"),
            [files.teacher],
            decode_threads=threads,
            keep_bytes=0,  # decode in every epoch, as of a large set
        )
        views = ViewSchedule(AugmentOptions(), files.store.size, seed=0)
        self.loader = TrainLoader(
            self.dataset, views, batch_size=BATCH, seed=0, loader_processes=processes
        )
        self.epochs = count()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.loader.epoch(next(self.epochs)):
            targets = batch.targets[0]
            yield {
                "frames": batch.inputs.permute(0, 2, 3, 1),
                "logits": targets.logits,
                "maps": decode_maps(targets),
            }


def measure(files: Files, kind: str, workers: int, rounds: int) -> Figure:
    """Measure one row: all sides in rounds, after an epoch of each whose records are compared."""
    sides = {
        title: _fastest([way() for way in ways], files)
        for title, ways in files.ways(kind, workers).items()
    }
    digests = {title: digest(batches, files) for title, batches in sides.items()}
    assert len(set(digests.values())) == 1, f"the sides yield different records: {digests}"
    times = in_rounds(
        {title: partial(read, batches, files) for title, batches in sides.items()},
        rounds,
        warm_up=0,
    )
    return against_best(
        name_stream(kind, files.side, workers),
        times,
        unit="us/record",
        scale=1e6 / files.records,
        aim=AIMS[kind],
    )


def _fastest(ways: list[Batches], files: Files) -> Batches:
    """Return the way whose second epoch is the shortest; the first one starts its processes."""
    for batches in ways:
        read(batches, files)
    if len(ways) == 1:
        return ways[0]
    return min(ways, key=lambda batches: seconds(partial(read, batches, files)))


def read(batches: Batches, files: Files) -> None:
    """Read one epoch, and check that it has all records in the expected shapes."""
    counted = 0
    for batch in batches:
        number = len(batch["frames"])
        counted += number
        assert batch["frames"].shape == (number, files.side, files.side, 3)
        assert batch["logits"].shape == (number, CLASSES)
        assert batch["maps"].shape == (number, 1, 1, 7, 7)
        assert batch["frames"].dtype == torch.uint8
        assert batch["logits"].dtype == batch["maps"].dtype == torch.float32
    assert counted == files.records


def digest(batches: Batches, files: Files) -> int:
    """Compute a digest of the records of an epoch that is independent of their order."""
    total = 0
    for batch in batches:
        for record in zip(*(batch[name] for name in ("frames", "logits", "maps")), strict=True):
            crc = 0
            for value in record:
                crc = zlib.crc32(value.contiguous().numpy().tobytes(), crc)
            total += crc
    return total
