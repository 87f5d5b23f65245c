"""Other readers of the same records, each with its own files, its own shuffle and its own loader.

Every peer stores the bytes of a JPEG with its logits and map as f16, and yields batches of frames u8 [B, H, W, 3],
which decoders write without a transposition, logits f32 [B, K] and maps f32 [B, E, A, h, w]. A batch is collated by one
function, which converts the values of all its records at once. LitData and MosaicML Streaming are installed by
`make bench`.
"""

from __future__ import annotations

import gc
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

BATCH = 50
_FILE_RECORDS = 1000
"""Records per file of peers with files of many records, as in the tars of `inputs.py`."""
_BUFFER_RECORDS = 1000
"""Records from which webdataset draws at random."""

Decode = Callable[[bytes], Tensor]
"""Function from an image file to its frame, u8 [3, H, W]."""
Batches = Iterable[dict[str, Tensor]]


class MissingPeerError(RuntimeError):
    """Error for packages that are not installed."""


class Sample(NamedTuple):
    """Record as every peer stores it."""

    jpeg: bytes
    logits: NDArray[np.float16]
    """Logits [K]."""
    map: NDArray[np.float16]
    """Map [E, A, h, w]."""


class Peer(ABC):
    """A reader with files of its own."""

    title: ClassVar[str]
    package: ClassVar[str]
    """Module whose absence makes the peer unavailable."""

    @abstractmethod
    def write(self, folder: Path, samples: Iterable[Sample]) -> None:
        """Write the records in the peer's format to a new folder."""

    @abstractmethod
    def load(self, folder: Path, workers: int, decode: Decode) -> Batches:
        """Open the folder for epochs in shuffled orders.

        workers  number of loader processes; with 0 this process reads
        """

    def write_its_way(self, folder: Path, samples: Iterable[Sample]) -> bool:
        """Write the records as the peer itself stores JPEGs, and return False if it cannot decode them to tensors."""
        return False

    def load_its_way(self, folder: Path, workers: int) -> Batches:
        """Open such a folder with the peer's own decoder."""
        raise NotImplementedError


def require_peers() -> None:
    """Raise MissingPeerError if the package of a peer is not installed."""
    missing = [peer.title for peer in PEERS if find_spec(peer.package) is None]
    if missing:
        raise MissingPeerError(
            f"{' and '.join(missing)}: not installed; `make bench` installs them in .venv-bench"
        )


@dataclass(frozen=True)
class _Collate:
    """Batch of stored records."""

    decode: Decode

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        frames = [self.decode(bytes(record["jpg"])).permute(1, 2, 0) for record in records]
        return {"frames": torch.stack(frames), **_targets(records)}


def _targets(records: Sequence[Any]) -> dict[str, Tensor]:
    logits, maps = (_stack([record[name] for record in records]) for name in ("logits", "map"))
    return {"logits": logits.float(), "maps": maps.float()}


def _stack(values: Sequence[Any]) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return torch.from_numpy(np.stack(values))


def _processes(workers: int) -> dict[str, Any]:
    """Options of torch's data loader, and of its subclasses."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": _start_worker,
    }


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the loaders of other peers, which belong to the process that was forked


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
        stream = stream.map(_parse_arrays).batched(BATCH, collation_fn=_Collate(decode))
        return webdataset.WebLoader(stream, batch_size=None, **_processes(workers))


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
            collate_fn=_Collate(decode),
            **_processes(workers),
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
        return self._open(folder, workers, _Collate(decode))

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
            dataset, batch_size=BATCH, collate_fn=collate, **_processes(workers)
        )


def _collate_decoded(records: Sequence[Any]) -> dict[str, Tensor]:
    frames = [record["jpg"].permute(1, 2, 0) for record in records]
    return {"frames": torch.stack(frames), **_targets(records)}


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
            dataset, batch_size=BATCH, collate_fn=_Collate(decode), **_processes(workers)
        )


PEERS: tuple[Peer, ...] = (LitDataPeer(), StreamingPeer(), WebDatasetPeer(), ImageFolderPeer())
