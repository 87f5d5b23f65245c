"""Common parts of all other readers of the same records: stored records, batches, and options of their processes.

Every peer stores the bytes of a JPEG with its logits and map as f16, and yields batches of frames u8 [B, H, W, 3],
which decoders write without a transposition, logits f32 [B, K] and maps f32 [B, E, A, h, w]. A batch is collated by one
function, which converts the values of all its records at once.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BATCH = 50
MAP_SHAPE = (1, 1, 7, 7)
"""Shape [E, A, h, w] of a record's map."""

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


@dataclass(frozen=True)
class Collate:
    """Batch of stored records."""

    decode: Decode

    def __call__(self, records: Sequence[Any]) -> dict[str, Tensor]:
        frames = [self.decode(bytes(record["jpg"])).permute(1, 2, 0) for record in records]
        return {"frames": torch.stack(frames), **stack_targets(records)}


def stack_targets(records: Sequence[Any]) -> dict[str, Tensor]:
    """Stack logits and maps of stored records, and convert them to f32."""
    logits, maps = (_stack([record[name] for record in records]) for name in ("logits", "map"))
    return {"logits": logits.float(), "maps": maps.float()}


def _stack(values: Sequence[Any]) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return torch.from_numpy(np.stack(values))


def process_options(workers: int) -> dict[str, Any]:
    """Options of torch's data loader, and of its subclasses."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "worker_init_fn": _start_worker,
    }


def _start_worker(number: int) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the loaders of other peers, which belong to the process that was forked
