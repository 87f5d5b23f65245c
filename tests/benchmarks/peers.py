"""Other readers of the same records, each with its own files, its own shuffle and its own loader.

LitData, MosaicML Streaming, SPDL and Lance are installed by `make bench`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from tests.benchmarks.peer import (
    BATCH,
    MAP_SHAPE,
    Batches,
    Collate,
    Decode,
    MissingPeerError,
    Peer,
    Sample,
    process_options,
    stack_targets,
)

_FILE_RECORDS = 500
"""Records per file of peers with files of many records: one for each process at least, as webdataset needs."""
_BUFFER_RECORDS = 1000
"""Records from which webdataset draws at random."""


# ---- webdataset ----------------------------------------------------------------------------------


class WebDatasetPeer(Peer):
    """Tars in which each record is a JPEG and two .npy files, read with a shuffle buffer."""

    title = "webdataset"
    package = "webdataset"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        folder.mkdir()
        pattern = str(folder / "%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=_FILE_RECORDS, verbose=0) as tars:
            for number, sample in enumerate(samples):
                members = {"jpg": sample.jpeg, "logits.npy": sample.logits, "map.npy": sample.map}
                tars.write({"__key__": f"{number:08d}", **members})

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        urls = sorted(map(str, folder.glob("*.tar")))
        stream = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(_BUFFER_RECORDS)
        stream = stream.map(_parse_arrays).batched(BATCH, collation_fn=Collate(decode))
        return webdataset.WebLoader(stream, batch_size=None, **process_options(workers))


def _parse_arrays(sample: dict[str, Any]) -> dict[str, Any]:
    arrays = {name: np.load(io.BytesIO(sample[f"{name}.npy"])) for name in ("logits", "map")}
    return {"jpg": sample["jpg"], **arrays}


# ---- one file per record -------------------------------------------------------------------------


class ImageFolderPeer(Peer):
    """torchvision's ImageFolder, and one .pt file with logits and map beside each image."""

    title = "ImageFolder and .pt"
    package = "torchvision"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        (folder / "all").mkdir(parents=True)
        for number, sample in enumerate(samples):
            path = folder / "all" / f"{number:08d}.jpg"
            path.write_bytes(sample.jpeg)
            torch.save(_as_tensors(sample), path.with_suffix(".pt"))

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        return DataLoader(
            _TaughtFolder(folder),
            batch_size=BATCH,
            shuffle=True,
            collate_fn=Collate(decode),
            **process_options(workers),
        )


class _TaughtFolder(ImageFolder):
    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), loader=_read)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path, _ = self.samples[number]
        stored = torch.load(os.path.splitext(path)[0] + ".pt", weights_only=True)  # noqa: PTH122
        return {"jpg": self.loader(path), **stored}


def _read(path: str) -> bytes:
    return Path(path).read_bytes()


def _as_tensors(sample: Sample) -> dict[str, Tensor]:
    return {"logits": torch.tensor(sample.logits), "map": torch.tensor(sample.map)}


# ---- LitData -------------------------------------------------------------------------------------


class LitDataPeer(Peer):
    """LitData's chunks, read by its own data loader."""

    title = "LitData"
    package = "litdata"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        self._write(folder, ({"jpg": sample.jpeg, **_as_tensors(sample)} for sample in samples))

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        return self._open(folder, workers, Collate(decode))

    def write_its_way(self, folder: Path, samples: Iterable[Sample]) -> bool:
        from litdata.types import Jpeg

        # Without a maximum quality the bytes are stored as they are.
        stored = ((Jpeg(bytes=sample.jpeg, max_quality=None), sample) for sample in samples)
        self._write(folder, ({"jpg": jpeg, **_as_tensors(sample)} for jpeg, sample in stored))
        return True

    def load_its_way(self, folder: Path, workers: int) -> Batches:
        return self._open(folder, workers, _collate_decoded)

    @staticmethod
    def _write(folder: Path, records: Iterable[dict[str, Any]]) -> None:
        """Write what `litdata.optimize` writes, in this process."""
        from litdata.streaming import Cache

        folder.mkdir()
        cache = Cache(str(folder), chunk_size=_FILE_RECORDS)
        for number, record in enumerate(records):
            cache[number] = record
        cache.done()
        cache.merge()

    @staticmethod
    def _open(folder: Path, workers: int, collate: Callable[..., Any]) -> Batches:
        from litdata import StreamingDataLoader, StreamingDataset

        # By default, records that are not declared as images are parsed 256 at a time, which takes four times as long.
        dataset = StreamingDataset(str(folder), shuffle=True, batch_decode=0)
        return StreamingDataLoader(
            dataset, batch_size=BATCH, collate_fn=collate, **process_options(workers)
        )


def _collate_decoded(records: Sequence[Any]) -> dict[str, Tensor]:
    frames = [record["jpg"].permute(1, 2, 0) for record in records]
    return {"frames": torch.stack(frames), **stack_targets(records)}


# ---- MosaicML Streaming --------------------------------------------------------------------------


class StreamingPeer(Peer):
    """MosaicML Streaming's shards, read by torch's data loader as in its documentation."""

    title = "MosaicML Streaming"
    package = "streaming"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        from streaming import MDSWriter

        columns = {"jpg": "bytes", "logits": "ndarray:float16", "map": "ndarray:float16"}
        with MDSWriter(out=str(folder), columns=columns) as shards:
            for sample in samples:
                shards.write({"jpg": sample.jpeg, "logits": sample.logits, "map": sample.map})

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        return DataLoader(
            dataset, batch_size=BATCH, collate_fn=Collate(decode), **process_options(workers)
        )


# ---- SPDL ----------------------------------------------------------------------------------------


class SPDLPeer(Peer):
    """SPDL's pipeline of threads over tars: one reads whole files, and as many as there are workers decode batches."""

    title = "SPDL"
    package = "spdl"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        WebDatasetPeer().write(folder, samples)

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        return _SPDLBatches(sorted(folder.glob("*.tar")), max(1, workers), Collate(decode))


class _SPDLBatches:
    """Epochs of a pipeline, which is built anew for each."""

    def __init__(self, tars: Sequence[Path], threads: int, collate: Collate) -> None:
        self.tars, self.threads, self.collate = tars, threads, collate
        self.random = Random(0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        from spdl.pipeline import PipelineBuilder

        tars = self.random.sample(self.tars, len(self.tars))
        builder = PipelineBuilder().add_source(tars).pipe(self._read)
        builder = builder.pipe(self.collate, concurrency=self.threads).add_sink(3)
        pipeline = builder.build(num_threads=self.threads + 1)
        with pipeline.auto_stop():
            yield from pipeline

    def _read(self, path: Path) -> Iterator[list[dict[str, Any]]]:
        """Read a tar, and yield its records in batches, in a random order."""
        import spdl.io

        records: dict[str, dict[str, Any]] = {}
        for name, data in spdl.io.iter_tarfile(path.read_bytes()):
            key, member = name.split(".", 1)
            value = data if member == "jpg" else spdl.io.load_npy(data)
            records.setdefault(key, {})[member.removesuffix(".npy")] = value
        shuffled = self.random.sample(list(records.values()), len(records))
        for start in range(0, len(shuffled), BATCH):
            yield shuffled[start : start + BATCH]


# ---- Lance ---------------------------------------------------------------------------------------


class LancePeer(Peer):
    """A Lance data set, of which random rows are taken at once."""

    title = "Lance"
    package = "lance"

    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        import lance

        every = list(samples)
        columns = {
            "jpg": pa.array([sample.jpeg for sample in every], pa.large_binary()),
            **{
                name: pa.FixedSizeListArray.from_arrays(
                    pa.array(np.concatenate([getattr(s, name).ravel() for s in every])),
                    getattr(every[0], name).size,
                )
                for name in ("logits", "map")
            },
        }
        lance.write_dataset(pa.table(columns), str(folder))

    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        options = process_options(workers)
        if workers:  # a forked process that inherits Lance's threads hangs
            options["multiprocessing_context"] = "spawn"
        return DataLoader(
            _TakenRows(folder),
            batch_size=BATCH,
            shuffle=True,
            collate_fn=Collate(decode),
            **options,
        )


class _TakenRows(Dataset[Any]):
    """Rows of a Lance data set, opened on first use in each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.rows = self._open().count_rows()
        self.opened: Any = None

    def _open(self) -> Any:
        import lance

        return lance.dataset(self.folder)

    def __len__(self) -> int:
        return self.rows  # type: ignore[no-any-return]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        if self.opened is None:
            self.opened = self._open()
        taken = self.opened.take(numbers).combine_chunks()
        jpegs = taken["jpg"].to_pylist()
        logits, maps = (
            taken[name].combine_chunks().flatten().to_numpy().reshape(len(numbers), *shape)
            for name, shape in (("logits", (-1,)), ("map", MAP_SHAPE))
        )
        rows = zip(jpegs, logits, maps, strict=True)
        return [{"jpg": jpeg, "logits": row, "map": grid} for jpeg, row, grid in rows]


PEERS: tuple[Peer, ...] = (
    LitDataPeer(),
    StreamingPeer(),
    SPDLPeer(),
    LancePeer(),
    WebDatasetPeer(),
    ImageFolderPeer(),
)


def require_peers() -> None:
    """Raise MissingPeerError if the package of a peer is not installed."""
    require_packages({peer.title: peer.package for peer in PEERS})


def require_packages(packages: Mapping[str, str]) -> None:
    """Raise MissingPeerError if a package is not installed; packages are named by the title of their peer."""
    missing = [
        title
        for title, package in packages.items()
        if find_spec(package.partition(".")[0]) is None or find_spec(package) is None
    ]
    if missing:
        raise MissingPeerError(
            f"{' and '.join(missing)}: not installed; `make bench` installs them in .venv-bench"
        )
