"""The stream of a store against other readers of the same records (peers.py).

equal  the same bytes, decoder, output and number of processes, with one thread in each
best   every side in its fastest way: a peer with its own decoder if that is faster than the store's. One worker is this
       process or one loader process, and two of the store are two loader processes or two decoding threads
warm   photographs at full size, decoded to frames of 224 pixels by the same decoder on every side
cold   the same, with each side's files dropped from the page cache before every epoch
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from permafrost.config.augment import AugmentOptions
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import decode_maps
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.store.image_decoding import decode_pixels
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.tars import ShardBytes
from tests.benchmarks.figures import (
    Figure,
    against_best,
    figure,
    in_rounds,
    in_turn,
    seconds,
)
from tests.benchmarks.inputs import CLASSES, precompute_config, write_photographs, write_tars
from tests.benchmarks.peer import BATCH, Batches, Sample
from tests.benchmarks.peers import PEERS, require_peers
from tests.benchmarks.stand_in import StandInConfig
from tests.support.images import decode_frame
from tests.support.verbs import precompute

OURS = "ours"
AIMS = {"equal": ">= 1.0", "best": ">= 1.2"}
PHOTOGRAPH_AIMS = {"warm": ">= 1.0", "cold": ">= 1.0"}
WORKERS = (1, 2)
ROUNDS = 6
PHOTOGRAPH_ROUNDS = 3
RECORDS = {32: 4_000, 224: 1_000}
"""Records of an epoch, by the side of the images in pixels."""
PHOTOGRAPHS = 2_000
"""Records of an epoch of photographs, whose files are different, as they are numbered."""
PHOTOGRAPH_SIDE = 224
DECODED = 200
"""Photographs of which decoding alone is measured."""

Way = Callable[[], Batches]
"""Function that opens a side's records for epochs."""


def name_stream(kind: str, images: str, workers: int) -> str:
    """Name of a figure."""
    return f"stream_{kind}_{images}_{workers}_worker{'s' if workers > 1 else ''}"


def stream_names(side: int) -> tuple[str, ...]:
    """Names of the figures of one size."""
    return tuple(name_stream(kind, f"{side}px", workers) for kind in AIMS for workers in WORKERS)


def streams_32_figures(folder: Path) -> list[Figure]:
    """Measure small images, where the reader's own work takes as long as decoding."""
    return _figures(folder, 32)


def streams_224_figures(folder: Path) -> list[Figure]:
    """Measure photographs, where decoding takes most of the time."""
    return _figures(folder, 224)


def _figures(folder: Path, side: int) -> list[Figure]:
    require_peers()
    torch.set_num_threads(1)
    records = RECORDS[side]
    files = Files(folder, write_tars(folder / "tars", records, side), side, records)
    return [
        measure(files, name_stream(kind, f"{side}px", workers), kind, workers, ROUNDS, AIMS[kind])
        for kind in AIMS
        for workers in WORKERS
    ]


THREADS_NAME = "photographs_2_decode_threads"
TORCHCODEC_NAME = "photographs_decode_vs_torchcodec"


def photograph_names() -> tuple[str, ...]:
    """Names of the figures of photographs."""
    return (
        *(photograph_name(kind, workers) for kind in PHOTOGRAPH_AIMS for workers in WORKERS),
        THREADS_NAME,
        TORCHCODEC_NAME,
    )


def photograph_name(kind: str, workers: int) -> str:
    """Return the name of a figure of photographs."""
    return name_stream(kind, "photographs", workers)


def photograph_figures(folder: Path) -> list[Figure]:
    """Measure photographs at full size, where decoding and resizing take nearly all of the time."""
    require_peers()
    torch.set_num_threads(1)
    tars = write_photographs(folder / "tars", PHOTOGRAPHS)
    files = Files(folder, tars, PHOTOGRAPH_SIDE, PHOTOGRAPHS)
    figures = [
        measure(files, photograph_name(kind, n), kind, n, PHOTOGRAPH_ROUNDS, aim)
        for kind, aim in PHOTOGRAPH_AIMS.items()
        for n in WORKERS
    ]
    two, one = (partial(read, StoreBatches(files, 0, threads=n), files) for n in (2, 1))
    pairs = in_turn(two, one, PHOTOGRAPH_ROUNDS)
    per_record = {"unit": "us/record", "scale": 1e6 / PHOTOGRAPHS}
    figures.append(figure(THREADS_NAME, pairs, faster=True, aim=">= 1.9", **per_record))
    return [*figures, _decoder_figure(files)]


def _decoder_figure(files: Files) -> Figure:
    """Measure the store's JPEG decoder beside torchcodec's, whose pixels must be the same, without resizing."""
    from torchcodec.decoders import ImageReadMode, decode_image

    jpegs = [sample.jpeg for sample in islice(samples(files.store, files.teacher), DECODED)]
    tensors = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    for jpeg, tensor in zip(jpegs, tensors, strict=True):
        theirs = decode_image(tensor, mode=ImageReadMode.RGB)
        assert torch.equal(torch.from_numpy(decode_pixels(jpeg)).permute(2, 0, 1), theirs)

    def decode() -> None:
        for jpeg in jpegs:
            decode_pixels(jpeg)

    def decode_with_torchcodec() -> None:
        for tensor in tensors:
            decode_image(tensor, mode=ImageReadMode.RGB)

    pairs = in_turn(decode, decode_with_torchcodec, ROUNDS)
    per_image = {"unit": "us/image", "scale": 1e6 / DECODED}
    return figure(TORCHCODEC_NAME, pairs, faster=True, aim=">= 1.0", **per_image)


class Files:
    """The same records as a store and in the formats of all peers."""

    def __init__(self, folder: Path, tars: Path, side: int, records: int) -> None:
        self.side, self.records = side, records
        path, teacher = folder / "store", StandInConfig(classes=CLASSES)
        config = precompute_config(tars, path, teacher=teacher)
        precompute.run(replace(config, store=replace(config.store, image_size=side)))
        self.store = Store(path)
        (self.teacher,) = self.store.open_passes()
        self.folders = {OURS: folder / "store"} | {p.title: folder / p.package for p in PEERS}
        self.tars = tars
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
            processes = [0, 1] if kind == "best" else [0]
        ours = [partial(StoreBatches, self, n) for n in processes]
        if kind != "equal" and workers > 1:
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


def measure(files: Files, name: str, kind: str, workers: int, rounds: int, aim: str) -> Figure:
    """Measure one row: all sides in rounds, after an epoch of each whose records are compared."""
    sides = {
        title: _fastest([way() for way in ways], files)
        for title, ways in files.ways(kind, workers).items()
    }
    digests = {title: digest(batches, files) for title, batches in sides.items()}
    assert len(set(digests.values())) == 1, f"the sides yield different records: {digests}"
    epochs = {title: partial(read, batches, files) for title, batches in sides.items()}
    if kind == "cold":
        epochs = {title: partial(_read_cold, files, title, read) for title, read in epochs.items()}
    times = in_rounds(epochs, rounds, warm_up=0)
    return against_best(name, times, unit="us/record", scale=1e6 / files.records, aim=aim)


def _read_cold(files: Files, title: str, read_epoch: Callable[[], None]) -> None:
    """Read an epoch whose files are not in the page cache. Dropping them takes some milliseconds, which count."""
    folders = [files.folders[title], *([files.tars] if title == OURS else [])]
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_epoch()


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
