"""Threads that decode the records of a batch, because decoders work without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import Any

import torch

from permafrost.config.training import TrainerOptions
from permafrost.core.distributed import DistributedContext
from permafrost.core.machine import usable_cores

_MAX_THREADS = 8
"""Maximum number of threads that are started without being asked for."""
_PARTS = 4
"""Parts of a batch per thread, so that no thread waits long for a slower one."""


def resolve_decode_threads(option: int | None, processes: int = 1) -> int:
    """Return the number of threads that an option `decode_threads` stands for.

    Args:
        option: Number of threads; None divides the cores that this process may use among the processes, for 1 to 8
            threads each.
        processes: Number of processes on this machine that decode at the same time.
    """
    return option if option is not None else min(max(usable_cores() // processes, 1), _MAX_THREADS)


def decode_threads_of(trainer: TrainerOptions, distributed: DistributedContext | None) -> int:
    """Return the threads that decode a batch, in each of the processes on this machine that load batches."""
    ranks = 1 if distributed is None else distributed.ranks_here
    return resolve_decode_threads(trainer.decode_threads, ranks * max(trainer.loader_processes, 1))


class DecodeThreads:
    """A fixed number of threads, started on first use. Copies in other processes start their own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[int], None], numbers: int) -> None:
        """Call `work` once with each of 0 .. numbers - 1, and return when all calls have ended.

        If calls fail, the error of the lowest number is raised, whatever the number of threads.
        """
        if self.count == 1 or numbers <= 1:
            for number in range(numbers):
                work(number)
            return

        def work_through(part: range) -> None:
            for number in part:
                work(number)

        size = -(-numbers // (self.count * _PARTS))
        self._pool = pool = self._pool or start_pool(self.count, "decode")
        parts = [
            pool.submit(work_through, range(start, min(start + size, numbers)))
            for start in range(0, numbers, size)
        ]
        wait(parts)
        for part in parts:
            part.result()

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_pool": None}


def start_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Start threads in which torch computes single-threaded; other threads keep their number of threads."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    all_started = Barrier(count)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # until asked, a thread takes the number that was set last anywhere
        all_started.wait()

    before = torch.get_num_threads()
    for started in [pool.submit(start) for _ in range(count)]:
        started.result()
    torch.set_num_threads(before)  # the default of threads that are started later
    return pool
