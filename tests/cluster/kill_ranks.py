"""Table of trainings whose ranks are killed: do they end with the weights of an undisturbed training?

    python -m tests.cluster.kill_ranks                 ten kills with seed 0 for 2, 3, 4 and 5 ranks in two precisions
    python -m tests.cluster.kill_ranks 4 9 3           four kills with seed 9 for 3 ranks

Ranks are processes of one Gloo group, without Ray. One of them gets SIGKILL at its n-th call of a function, for a
random n: in a forward pass, between collective operations, or in the middle of a checkpoint. All ranks are then started
again, as Ray Train does.
"""

import os
import random
import signal
import sys
import tempfile
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from permafrost.config.methods import E2KDConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.distributed import DistributedContext
from permafrost.runs.folder import CHECKPOINT_NAME
from permafrost.store.reader import Store
from permafrost.training import loop
from permafrost.training.distill import StudentPlan
from permafrost.training.step import train_step
from tests.support.networks import save_tiny_teacher
from tests.support.processes import fork_server
from tests.support.ranks import leave_group
from tests.support.runs import distill_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import precompute

OPTIONS = {"epochs": 4, "num_threads": 1, "checkpoint_every_steps": 3}
HEAD = "| ranks | precision | seed | kills | after a checkpoint | equal weights |\n|---|---|---|---|---|---|"


def plan_ranks(frozen, folder, ranks, precision):
    """Plan a student of so many ranks, with checkpoints in the middle of epochs."""
    folder.mkdir(parents=True)
    trainer = TrainerOptions(batch_size=4 * ranks, ranks=ranks, precision=precision, **OPTIONS)
    return StudentPlan(distill_config(frozen, trainer=trainer, method=E2KDConfig(tau=4.0)), folder)


def train_ranks(plan, last_calls=None):
    """Train on all ranks, and end them when one dies. Return True if they finish.

    last_calls  number of the call at which each rank is killed, 0 for none; None writes the numbers of their calls
    """
    # The import of TensorBoard in a training would draw most of the kills.
    context = fork_server("torch.utils.tensorboard", "pandas")
    with tempfile.TemporaryDirectory() as group:
        arguments = [(rank, plan, group, last_calls) for rank in range(plan.trainer.ranks)]
        processes = [context.Process(target=_train_rank, args=own) for own in arguments]
        for process in processes:
            process.start()
        while running := [process.sentinel for process in processes if process.is_alive()]:
            wait(running)
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
    return not any(process.exitcode for process in processes)


def _train_rank(rank, plan, group, last_calls):
    torch.set_num_threads(1)
    calls, last = 0, last_calls[rank] if last_calls else -1

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_from_here(*arguments):
        sys.setprofile(count if last else None)
        return train_step(*arguments)

    if last_calls:  # the other ranks report that they lost one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    loop.train_step = count_from_here
    ranks = plan.trainer.ranks
    dist.init_process_group("gloo", init_method=f"file://{group}/g", rank=rank, world_size=ranks)
    plan.train(lambda *_: None, DistributedContext(rank, ranks))
    sys.setprofile(None)
    if not last_calls:
        (plan.folder / f"calls-{rank}").write_text(str(calls))
    leave_group()


def run_cell(frozen, folder, ranks, precision, seed, kills):
    """Disturb each training once. Return how many resumed from a checkpoint, and how many had equal weights."""
    draw = random.Random(f"{ranks} {precision} {seed}")
    whole = plan_ranks(frozen, folder / "whole", ranks, precision)
    assert train_ranks(whole)
    resumed = equal = 0
    for number in range(kills):
        last_calls = [0] * ranks
        rank = draw.randrange(ranks)
        last_calls[rank] = draw.randrange(1, int((whole.folder / f"calls-{rank}").read_text()))
        killed = plan_ranks(frozen, folder / str(number), ranks, precision)
        assert not train_ranks(killed, last_calls)
        resumed += (killed.folder / CHECKPOINT_NAME).exists()
        assert train_ranks(killed, [0] * ranks)
        networks = [(plan.folder / "model.safetensors").read_bytes() for plan in (whole, killed)]
        equal += networks[0] == networks[1]
    return resumed, equal


def main():
    """Print the table."""
    kills, seed, *counts = map(int, sys.argv[1:] or ["10", "0", "2", "3", "4", "5"])
    print(HEAD)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = precompute_config(folder / "store", save_tiny_teacher(folder))
        precompute.run(config)
        frozen = Frozen(Store(Path(config.store.path)), config)
        for ranks, precision in product(counts, ("float32", "bfloat16")):
            cell = (ranks, precision, seed, kills)
            outcomes = run_cell(frozen, folder / f"{ranks}-{precision}", *cell)
            print("|", " | ".join(map(str, (*cell, *outcomes))), "|", flush=True)


if __name__ == "__main__":
    main()
