"""Processes that train as ranks of one process group."""

import os
import sys

import torch.distributed as dist
import torch.multiprocessing

from permafrost.core.distributed import DistributedContext
from tests.support.processes import fork_server


def join_group(rank, folder, ranks=2):
    """Join the process group of a folder with one thread, and return its collective operations."""
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=ranks)
    return DistributedContext(rank, ranks)


def leave_group() -> None:
    """Leave the process group and end the process immediately.

    DistributedDataParallel keeps the group even after it is collected, so that gloo's threads still run after
    `destroy_process_group`. An interpreter that exits meanwhile is sometimes aborted with SIGABRT ("terminate called
    without an active exception", one of 25 runs on a busy machine). Ray ends its workers itself.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_on_ranks(function, *arguments, ranks=2):
    """Run function(rank, *arguments) in one process per rank, and raise the first error of a process.

    The processes are forked from a server that imports torch and the training once for all tests.
    """
    fork_server()
    torch.multiprocessing.start_processes(
        function, arguments, nprocs=ranks, start_method="forkserver"
    )
