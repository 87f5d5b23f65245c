"""Trainings without a run, and comparison of their states."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from permafrost.config.methods import MethodConfig
from permafrost.config.training import OptimizerOptions
from permafrost.losses.base import build_loss
from permafrost.training.optim import build_optimizer
from permafrost.training.state import Training
from permafrost.training.step import train_step
from tests.support.batches import FRAME, random_batch, tiny_model


def build_training(seed: int, method: MethodConfig, **optimizer: Any) -> Training:
    model = tiny_model(seed)
    return Training(
        model=model,
        loss=build_loss(method),
        optimizer=build_optimizer(OptimizerOptions(**optimizer), list(model.parameters())),
    )


def assert_same_state(training: Training, expected: Training) -> None:
    """Check that all values that affect further steps are bitwise equal."""
    assert training.state()["position"] == expected.state()["position"]
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], tensor), name
    moments, expected_moments = (t.optimizer.state_dict()["state"] for t in (training, expected))
    assert moments.keys() == expected_moments.keys()
    for index, entries in expected_moments.items():
        for name, tensor in entries.items():
            assert torch.equal(moments[index][name], tensor), (index, name)


def take_steps(training: Training, seeds: range) -> None:
    """Take steps on random batches, counted as in `fit`."""
    for seed in seeds:
        train_step(training, random_batch(seed), FRAME, clip_norm=1.0)
        training.step += 1
        training.global_step += 1


class HostReads(TorchDispatchMode):
    """Recorder of the operations for which the host would wait for the device.

    Adam's step counters are excluded, as they are always stored on the host.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique")

    def __init__(self, optimizer):
        super().__init__()
        self.found = []
        states = optimizer.state.values()
        self.on_host = {state["step"].data_ptr() for state in states if "step" in state}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = any(name in function.__name__ for name in self.NAMES)
        if reads and args[0].data_ptr() not in self.on_host:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))
