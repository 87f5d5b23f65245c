"""Processes that train as ranks of one process group."""

import os
import sys

import torch.distributed as dist
import torch.multiprocessing

from tests.support.processes import fork_server


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
