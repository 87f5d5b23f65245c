"""Errors of a device and of memory: one line each, at the first shard, with a way out."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.cli import attempt
from permafrost.cluster.ray_executor import RayExecutor
from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.store import PassOptions, StoreOptions
from permafrost.core.errors import (
    ConfigError,
    DeviceError,
    RecordError,
    UserError,
    device_error,
    device_errors,
)
from permafrost.core.tasks import ShardError
from permafrost.evaluation import forward
from permafrost.store.reader import Store
from permafrost.training import loop
from tests.support.exchange import values_by_key
from tests.support.runs import evaluate_config
from tests.support.settings import FROZEN, METHODS, pass_config, training_config
from tests.support.stores import Frozen, precompute_config
from tests.support.verbs import distill, evaluate, precompute

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 5.06 MiB is. "
    "Including non-PyTorch memory, this process has 79.14 GiB memory in use. Of the allocated memory 70 GiB"
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            torch.OutOfMemoryError(OUT_OF_MEMORY),
            "not enough memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory"
            ),
            "not enough memory ([enforce fail",
        ),
        (MemoryError("Unable to allocate 2 TiB for an array"), "not enough memory (Unable"),
        (MemoryError(), "not enough memory (MemoryError)"),
        (
            torch.AcceleratorError(
                "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"
            ),
            "the device does not compute (CUDA error: no kernel image is available for execution on the device",
        ),
        (
            RuntimeError("The NVIDIA driver on your system is too old (found version 11040)"),
            "the device does not compute (The NVIDIA driver on your system is too old (found version 11040)",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "the device does not compute"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "not enough memory"),
    ],
)
def test_an_error_of_the_device_is_one_line(error, text):
    described = str(device_error(error, "lower it"))
    assert described.startswith(text)
    assert "\n" not in described
    assert described.endswith("; lower it") or "permafrost doctor" in described
    code, line = attempt("permafrost", lambda: (_ for _ in ()).throw(error))
    assert code == 1
    assert line.startswith(f"permafrost: error: {text}")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        ),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error"),
    ],
)
def test_an_error_of_a_program_keeps_its_traceback(error):
    assert device_error(error) is None
    with pytest.raises(type(error)), device_errors("lower it"):
        raise error


def test_an_error_that_is_described_already_is_kept():
    with pytest.raises(ConfigError, match="out of memory"), device_errors("lower it"):
        raise ConfigError("out of memory")


class SmallDevice:
    """A forward pass that has room for so many records, and notes how many it was given."""

    def __init__(self, monkeypatch, room):
        self.room, self.batches = room, []
        original = TeacherAnnotator._forward

        def forward(annotator, inputs, outputs):
            self.batches.append(len(inputs))
            if len(inputs) > self.room:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return original(annotator, inputs, outputs)

        monkeypatch.setattr(TeacherAnnotator, "_forward", forward)


def pass_of(folder, monkeypatch, name, **options):
    monkeypatch.chdir(folder)
    precompute.run(pass_config(name, **{"outputs": ("logits", "maps"), **options}))
    return values_by_key(Store("store"), name)


def test_a_teacher_without_room_ends_at_its_first_shard_with_what_to_lower(tmp_path, monkeypatch):
    device = SmallDevice(monkeypatch, room=2)
    with pytest.raises(UserError, match=r"lower annotate.batch_size=8, or set it to auto"):
        pass_of(tmp_path, monkeypatch, "full")
    assert device.batches.count(8) == 1


def test_auto_halves_the_batches_of_a_teacher_without_room(tmp_path, monkeypatch, caplog):
    (tmp_path / "whole").mkdir()
    (tmp_path / "halved").mkdir()
    whole = pass_of(tmp_path / "whole", monkeypatch, "auto", batch_size="auto")
    device = SmallDevice(monkeypatch, room=5)
    with caplog.at_level(logging.WARNING):
        halved = pass_of(tmp_path / "halved", monkeypatch, "auto", batch_size="auto")
    assert 4 in device.batches
    assert any("going on with" in message for message in caplog.messages)
    for field in ("logits", "map"):
        for key, values in whole[field].items():
            np.testing.assert_allclose(halved[field][key], values, rtol=1e-4, atol=1e-3)


def test_a_batch_size_is_a_number_or_auto():
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(ConfigError, match=r"annotate\.batch_size"):
            PassOptions(batch_size=wrong)
    assert PassOptions(batch_size="auto").records_per_batch == PassOptions().records_per_batch == 64


class FailAlike:
    """Task that fails in the same way on every shard, or in one of its own."""

    needs_gpu = False

    def __init__(self, folder, error):
        self.folder, self.error = folder, error

    def __call__(self, shard):
        (self.folder / str(shard)).touch()
        raise self.error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "tried"),
    [(DeviceError("no room"), (1, 2)), (RecordError("record 3"), (40,))],
    ids=str,
)
def test_on_ray_an_error_that_all_shards_share_ends_the_work(tmp_path, error, tried):
    executor = RayExecutor(LocalClusterConfig(actors=1))
    try:
        with pytest.raises(ShardError, match=str(error)):
            list(executor.map_shards(FailAlike(tmp_path, error), range(40)))
    finally:
        executor.close()
    assert len(list(tmp_path.iterdir())) in tried


def test_a_training_without_room_names_its_batch_size(tmp_path, monkeypatch):
    pass_of(tmp_path, monkeypatch, "frozen")

    def fail(*_, **__):
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fail)
        with pytest.raises(DeviceError, match=r"lower trainer.batch_size=8"):
            distill.run(training_config("student", METHODS["kd"]))
    distill.run(training_config("student", METHODS["kd"]))
    config = precompute_config(Path("store"), FROZEN)
    monkeypatch.setattr(forward, "_predict_batch", fail)
    with pytest.raises(DeviceError, match=r"lower evaluate.batch_size=256"):
        evaluate.run(
            replace(
                evaluate_config(Frozen(Store("store"), config), run="student", splits=("test",)),
                store=StoreOptions(path="store", teacher=("frozen",)),
            )
        )
