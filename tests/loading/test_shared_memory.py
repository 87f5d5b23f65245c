"""Batches of loader processes: the same tensors, and shared memory that is checked before and never a hang."""

import os
import pickle
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from permafrost.config.data import ImageFolderDataConfig
from permafrost.core.batches import Batch, StoredTargets
from permafrost.core.errors import ConfigError, UserError
from permafrost.library import open_store
from permafrost.loading import loader, transfer
from permafrost.loading import transfer as worker_batches
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.record_loader import RecordLoader
from permafrost.loading.transfer import (
    SharedMemoryError,
    check_shared_memory,
    iter_sent,
    pack_batch,
    unpack_batch,
)
from tests.support.batches import random_batch
from tests.support.image_sets import image_bytes
from tests.support.paths import ROOT
from tests.support.processes import run_program
from tests.support.stores import precompute_config
from tests.support.verbs import precompute

OPTION = "trainer.loader_processes"


@pytest.fixture
def free_bytes(monkeypatch):
    """Function that sets the free bytes of shared memory."""

    def set_free(count):
        status = SimpleNamespace(f_bavail=count, f_frsize=1)
        monkeypatch.setattr(transfer.os, "statvfs", lambda _: status)

    monkeypatch.setattr(transfer, "_SHARED_MEMORY", ROOT)  # exists on every machine
    return set_free


def test_batches_that_do_not_fit_are_refused_with_sizes_and_ways_out(free_bytes):
    free_bytes(4_999_999)

    with pytest.raises(ConfigError) as caught:
        check_shared_memory(1_000_000, 2, OPTION)

    assert str(caught.value).startswith(
        f"{OPTION}=2 needs 5.0 MB of shared memory for batches of 1.0 MB"
    )
    assert "--shm-size" in str(caught.value)


@pytest.mark.parametrize(("batch_bytes", "processes"), [(1_000_000, 2), (60_000, 99), (10**9, 0)])
def test_batches_that_fit_or_are_sent_otherwise_are_accepted(free_bytes, batch_bytes, processes):
    free_bytes(5_000_000 if batch_bytes == 1_000_000 else 0)

    check_shared_memory(batch_bytes, processes, OPTION)


def test_the_loaders_check_before_they_start_a_process(frozen, free_bytes, monkeypatch):
    free_bytes(1000)
    monkeypatch.setattr(transfer, "_SMALL", 1000)
    records = open_store(frozen.store.path).select("train")
    dataset = StoreDataset(records.store, records.rows, frozen.store.open_passes(()))

    with pytest.raises(ConfigError, match=r"num_workers=2 needs"):
        RecordLoader(records, batch_size=8, num_workers=2)
    with pytest.raises(ConfigError, match=rf"{OPTION}=2 needs"):
        TrainLoader(dataset, None, batch_size=8, seed=0, loader_processes=2)


def test_the_size_of_a_record_is_that_of_its_tensors(frozen):
    dataset = StoreDataset(frozen.store, range(8), frozen.store.open_passes(()))
    batch = dataset.__getitems__(list(range(8)))
    (targets,) = batch.targets
    stored = (
        batch.inputs.nbytes + targets.maps.nbytes + targets.logits.nbytes // 2
    )  # float16 on disk

    assert stored <= 8 * dataset.record_bytes <= 1.3 * stored


def test_a_large_tensor_is_moved_to_shared_memory_where_its_error_is_not_lost(monkeypatch):
    batch = random_batch(0)
    large = replace(batch, inputs=torch.zeros(4, 3, 256, 256, dtype=torch.uint8))
    assert pack_batch(large).inputs.is_shared()

    def fail(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    with pytest.raises(SharedMemoryError):
        pack_batch(replace(large, inputs=large.inputs.clone()))


def failing(error, cause=None):
    """Iterator of batches that fails after the first one."""
    yield 1
    raise error from cause


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (SharedMemoryError("x"), None, "does not fit into .*--shm-size"),
        (
            RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly"),
            RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."),
            "a loader process was killed .*Bus error",
        ),
    ],
)
def test_a_lost_batch_is_one_line_with_its_cause(error, cause, message):
    with pytest.raises(UserError, match=message):
        list(iter_sent(failing(error, cause), OPTION))


def test_another_error_passes_through():
    with pytest.raises(RuntimeError, match=r"^other$"):
        list(iter_sent(failing(RuntimeError("other")), OPTION))


class _Slow(StoreDataset):
    """Records of which a process never sends a batch."""

    def __getitems__(self, positions):
        time.sleep(60)


def test_a_batch_that_never_comes_is_not_waited_for_forever(frozen, monkeypatch):
    monkeypatch.setattr(loader, "MAX_WAIT_SECONDS", 0.5)
    slow = _Slow(frozen.store, range(8), frozen.store.open_passes(()))

    with pytest.raises(UserError, match=r"no batch came from the loader processes for .* s"):
        next(TrainLoader(slow, None, batch_size=8, seed=0, loader_processes=1).epoch(0))


PROGRAM = """
import sys
import permafrost
from permafrost.loading import record_loader, loader
if __name__ == "__main__":
    if sys.argv[2] == "later":
        record_loader.check_shared_memory = lambda *_: None
    records = permafrost.open_store(sys.argv[1]).select("train")
    try:
        for batch in permafrost.RecordLoader(records, batch_size=16, num_workers=2, teacher=()):
            batch.images
    except permafrost.UserError as error:
        print("line:", error)
"""


@pytest.fixture
def photographs():
    """Store of 48 images of 128 pixels, in a folder that is not in /dev/shm, where those of the tests may be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for number in range(48):
            path = Path(folder) / f"set/{'ab'[number % 2]}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number, size=(128, 128)))
        data = ImageFolderDataConfig(path=f"{folder}/set")
        precompute.run(precompute_config(Path(folder) / "store", data=data))
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "later"])
def test_a_small_shared_memory_ends_in_a_line_and_no_hang(photographs, when):
    """In a mount namespace of its own, whose /dev/shm has room for one batch."""
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare")
    program = photographs / "loop.py"
    program.write_text(PROGRAM)
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    words = [sys.executable, str(program), str(photographs / "store"), when]
    done = run_program([unshare, "-m", "sh", "-c", mount, "sh", *words], timeout=120, cwd=ROOT)
    if "mount" in done.stderr and "line: " not in done.stdout and done.returncode == 32:
        pytest.skip("mounts are not allowed here")

    assert "line: " in done.stdout, done.stderr[-2000:]
    assert "--shm-size" in done.stdout


def batch_of(records, side):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (records, side, side, 3), generator=generator, dtype=torch.uint8)
    return Batch(
        keys=tuple(map(str, range(records))),
        record_index=torch.arange(records),
        inputs=frames.permute(0, 3, 1, 2),
        canonical_from_view=None,
        view_index=torch.full((records,), -1),
        original_size=torch.rand(records, 2, generator=generator),
        labels=torch.arange(records),
        groups=torch.arange(records),
        boxes=(torch.zeros(0, 5), torch.rand(2, 5, generator=generator)),
        targets=(
            StoredTargets(
                teacher="t",
                logits=torch.rand(records, 10, generator=generator),
                maps=torch.rand(records, 1, 1, 64, 64, generator=generator).half(),
                intermediates={"pooled": torch.rand(records, 8, generator=generator)},
            ),
        ),
    )


def leaves(batch):
    found = []
    worker_batches.map_leaves(batch, lambda leaf: found.append(leaf) or leaf)
    return found


def test_a_batch_comes_back_with_the_same_values_and_memory_formats():
    batch = batch_of(16, 8)

    sent = pickle.loads(pickle.dumps(pack_batch(batch)))  # noqa: S301
    received = unpack_batch(sent)

    for before, after in zip(leaves(batch), leaves(received), strict=True):
        assert type(before) is type(after)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype
            assert before.stride() == after.stride() or before.numel() == 0
            assert torch.equal(before, after)
        else:
            assert before == after


def test_small_tensors_are_arrays_on_their_way_and_large_or_permuted_ones_are_not(monkeypatch):
    monkeypatch.setattr(worker_batches, "_SMALL", 16 * 64 * 64 * 2 - 1)

    sent = pack_batch(batch_of(16, 8))

    assert isinstance(sent.inputs, torch.Tensor)  # small, but with channels last
    assert isinstance(sent.targets[0].maps, torch.Tensor)  # one byte too large
    assert isinstance(sent.labels, np.ndarray)
    assert isinstance(sent.targets[0].intermediates["pooled"], np.ndarray)
    assert all(isinstance(boxes, np.ndarray) for boxes in sent.boxes)
    assert isinstance(replace(sent, boxes=()).keys[0], str)
