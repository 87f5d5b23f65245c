"""Batches on their way to the training device, from this process or from loader processes.

Torch passes each tensor of a loader process as a file of shared memory, which takes a tenth of a millisecond however
small it is, and a batch has a dozen small tensors, or one per record of boxes. These are sent in the message itself.

On a GPU a thread reads the next batch, pins it and copies it while the current step runs, small tensors in one copy. It
draws nothing from torch's global generator, which is that of the step. There is no such thread on a CPU, where it would
compete with the step for cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from permafrost.core.batches import (
    Batch,
    Mixture,
    Moves,
    PixelAugment,
    PixelChange,
    StoredTargets,
    TopLogits,
)
from permafrost.core.errors import UserError, require
from permafrost.loading.decode_threads import start_pool

_SMALL = 64 * 2**10
"""Maximum bytes of a tensor that is sent in the message."""


MAX_WAIT_SECONDS = 600
"""Longest wait for a batch of a loader process, which reading never takes. Without a limit, a lost batch would be
waited for forever."""
_PREFETCHED = 2
"""Batches that each loader process prepares ahead, the default of torch.utils.data.DataLoader."""
_SHARED_MEMORY = Path("/dev/shm")


class SharedMemoryError(UserError, RuntimeError):
    """Batch of a loader process that does not fit into shared memory."""


def pack_batch(batch: Batch) -> Batch:
    """Make a batch of a loader process ready to be sent: small tensors become arrays, which are pickled as bytes.

    Others are moved to shared memory here. Torch would do that in a thread, where an error silently loses the batch.

    Raises:
        SharedMemoryError: If shared memory has no room.
    """
    try:
        packed: Batch = map_leaves(batch, _pack)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise SharedMemoryError(str(error)) from error
    return packed


def unpack_batch(batch: Batch) -> Batch:
    """Return the batch that `pack_batch` was given."""
    unpacked: Batch = map_leaves(
        batch, lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
    )
    return unpacked


def _pack(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    # The memory format of other tensors would not survive.
    if value.is_contiguous() and value.nbytes <= _SMALL:
        return value.numpy()
    return value.share_memory_()  # type: ignore[no-untyped-call]


def check_shared_memory(batch_bytes: int, processes: int, option: str) -> None:
    """Check that the batches which loader processes prepare fit into shared memory.

    Args:
        batch_bytes: Size of a batch in bytes.
        processes: Number of loader processes.
        option: Option that sets the number of processes, for the message.

    Raises:
        ConfigError: If they do not fit.
    """
    if processes == 0 or batch_bytes <= _SMALL or not _SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(_SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, batch_bytes * (_PREFETCHED * processes + 1)
    require(
        needed <= free,
        f"{option}={processes} needs {needed / 1e6:,.1f} MB of shared memory for batches of "
        f"{batch_bytes / 1e6:,.1f} MB, but {_SHARED_MEMORY} has {free / 1e6:,.1f} MB; enlarge it (docker run "
        f"--shm-size=8g) or set {option}=0",
    )


def iter_sent(batches: Iterator[Any], option: str) -> Iterator[Any]:
    """Iterate over what loader processes send; name the cause and the fix if a process or a batch is lost.

    Args:
        batches: Iterator of a DataLoader with processes, which waits for MAX_WAIT_SECONDS.
        option: Option that sets their number, for messages.

    Raises:
        UserError: If a process was killed, shared memory is full, or no batch came in that time.
    """
    try:
        yield from batches
    except SharedMemoryError as error:
        raise SharedMemoryError(
            f"a batch of a loader process does not fit into {_SHARED_MEMORY}, which is full; enlarge it (docker run "
            f"--shm-size=8g) or set {option}=0"
        ) from error
    except RuntimeError as error:
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        if "timed out" in text:
            raise UserError(
                f"no batch came from the loader processes for {MAX_WAIT_SECONDS} s; look at what they print, or "
                f"set {option}=0 to read in this process"
            ) from error
        if "killed by signal" in text:
            raise UserError(
                f"a loader process was killed ({text[:200]}): the machine, or {_SHARED_MEMORY}, ran out of memory; "
                f"lower {option} or the batch size"
            ) from error
        raise


# ---- transfer --------------------------------------------------------------------------------------


Read = TypeVar("Read")
Copied = TypeVar("Copied")


def pinned_for(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host in memory from which a GPU copies it without a wait; as it is for other devices."""
    # A copy from pageable memory would synchronize with the device even if non_blocking.
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device`, or return it if it is there."""
    return pinned_for(tensor, device).to(device, non_blocking=True)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch to `device`, except what is read on the host: boxes, and a second set of labels."""
    if device == batch.inputs.device:
        return batch
    moved: Batch = move_values(replace(batch, boxes=(), host_labels=None), device)
    return replace(moved, boxes=batch.boxes, host_labels=batch.labels_on_host)


ChangedBatch = tuple[Batch, PixelAugment | None]
"""A batch, and changes of its pixels that are not part of it yet."""


def _move_changed(changed: ChangedBatch, device: torch.device) -> ChangedBatch:
    return move_batch(changed[0], device), move_values(changed[1], device)


def read_ahead(
    batches: Iterator[Read], copy: Callable[[Read], Copied]
) -> Iterator[tuple[Read, Copied]]:
    """Iterate over batches and their copies, made in a thread one batch ahead. An error is raised in its place.

    Args:
        batches: Batches to read, in the thread.
        copy: Function that copies a batch, in the thread.
    """

    def read() -> tuple[Read, Copied] | None:
        batch = next(batches, None)
        return None if batch is None else (batch, copy(batch))

    with start_pool(1, "read-ahead") as pool:
        waiting = pool.submit(read)
        while (pair := waiting.result()) is not None:
            waiting = pool.submit(read)
            yield pair


def copy_ahead(batches: Iterator[ChangedBatch], device: torch.device) -> Iterator[ChangedBatch]:
    """Iterate over copies of batches on a GPU, which are made on a stream of their own one batch ahead."""
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(batch: ChangedBatch) -> tuple[ChangedBatch, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return _move_changed(batch, device), copies.record_event()

    def reserve(leaf: Any) -> Any:
        """Keep the memory of a copy from being reused before this stream's work on it is done."""
        if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
            leaf.record_stream(torch.cuda.current_stream(device))
        return leaf

    for _, (moved, copied) in read_ahead(batches, copy):
        torch.cuda.current_stream(device).wait_event(copied)
        map_leaves(moved, reserve)
        yield moved


def iter_on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Iterate over batches on `device`, where they are copied one batch ahead on a GPU."""
    yield from (
        batch for batch, _ in iter_changed_on_device(((batch, None) for batch in batches), device)
    )


def iter_changed_on_device(
    batches: Iterator[ChangedBatch], device: torch.device
) -> Iterator[ChangedBatch]:
    """Iterate over batches and changes of their pixels on `device`, as `iter_on_device` does."""
    if device.type == "cuda":
        return copy_ahead(batches, device)
    return (_move_changed(batch, device) for batch in batches)


def move_values(value: Any, device: torch.device) -> Any:
    """Copy the tensors in a batch's values to `device`, small ones of the host in one copy if it is a GPU."""
    small: dict[int, Tensor] = {}

    def note(leaf: Any) -> None:
        is_on_host = isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        if is_on_host and 0 < leaf.nbytes <= _SMALL and leaf.is_contiguous():
            small[id(leaf)] = leaf

    if device.type == "cuda":
        map_leaves(value, note)
    copies = dict(zip(small, _copy_together(list(small.values()), device), strict=True))

    def move(leaf: Any) -> Any:
        if id(leaf) in copies:
            return copies[id(leaf)]
        return copy_to(leaf, device) if isinstance(leaf, Tensor) else leaf

    return map_leaves(value, move)


def _copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy contiguous tensors of the host to a GPU in one piece of memory, of which they are parts."""
    if not tensors:
        return []
    sizes = (-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
    *starts, total = accumulate(sizes, initial=0)
    extents = [
        slice(start, start + tensor.nbytes) for start, tensor in zip(starts, tensors, strict=True)
    ]
    buffer = torch.zeros(total, dtype=torch.uint8)
    for part, tensor in zip(_parts_of(buffer, extents, tensors), tensors, strict=True):
        part.copy_(tensor)
    return _parts_of(copy_to(buffer, device), extents, tensors)


def _parts_of(buffer: Tensor, extents: Sequence[slice], like: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the types and shapes of others, whose bytes are at these extents of a buffer u8 [n]."""
    return [
        buffer[extent].view(tensor.dtype).view(tensor.shape)
        for extent, tensor in zip(extents, like, strict=True)
    ]


_ALIGNMENT = 16
"""Multiple of bytes at which a tensor begins, the widest access of a GPU's thread."""


_PARTS = (Batch, StoredTargets, TopLogits, Moves, PixelAugment, PixelChange, Mixture)
"""Classes whose fields are leaves of a batch, or parts of it themselves."""


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change the values of a batch that are not batches, mappings or tuples of others themselves.

    Args:
        value: Batch, or a part of one.
        change: Function from a value to the one that takes its place.
    """
    if isinstance(value, _PARTS):
        names = value.__dataclass_fields__
        return type(value)(**{name: map_leaves(getattr(value, name), change) for name in names})
    if isinstance(value, dict):
        return {name: map_leaves(member, change) for name, member in value.items()}
    if isinstance(value, tuple):
        return tuple(map_leaves(member, change) for member in value)
    return change(value)
