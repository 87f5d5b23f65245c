"""Threads of a training: they follow the work of a step, and wait without taking a core."""

import os
import sys
from pathlib import Path

import pytest
import torch

from permafrost.config.environment import THREAD_ENVIRONMENT
from permafrost.config.models import CifarModelConfig
from permafrost.config.training import TrainerOptions
from permafrost.models.cost import measure_cost
from permafrost.models.providers import build_model
from permafrost.training import loop as module
from permafrost.training.loop import step_threads
from permafrost_papers.ked.options import AdditiveModelConfig
from tests.support.paths import ROOT
from tests.support.processes import run_program
from tests.support.runs import distill_config
from tests.support.verbs import distill

_LIBRARIES = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
LOAD_OPENMP = (
    f"import ctypes; ctypes.CDLL({str(_LIBRARIES[0])!r})" if _LIBRARIES else "import torch"
)
"""Statement that loads PyTorch's OpenMP, without the rest of PyTorch where it is a file of its own."""


def network(width):
    return build_model(CifarModelConfig(name="resnet8", width=width), 10)


def test_threads_grow_with_the_network_the_batch_and_the_teacher_up_to_those_there_are(monkeypatch):
    small, large = network(4), network(8)
    macs = measure_cost(small, torch.zeros(1, 3, 32, 32)).macs
    monkeypatch.setattr(module, "_MACS_PER_THREAD", 10 * macs)

    def threads(*networks, records, available=64, size=(32, 32)):
        return step_threads([(net, (3, *size)) for net in networks], records, available)

    assert threads(small, records=1) == 1
    assert threads(small, records=19) == 1
    assert threads(small, records=20) == 2
    assert threads(small, records=21, size=(64, 64)) == 8
    assert threads(large, records=20) > threads(small, records=20)
    assert threads(small, small, records=20) == 4
    assert threads(small, records=2000) == 64
    assert threads(small, records=2000, available=1) == 1


def test_a_table_takes_one_thread():
    config = AdditiveModelConfig(name="mlp", columns=12, superfeatures=4)

    assert step_threads([(build_model(config, 3), (12,))], 1000, 8) == 1


@pytest.mark.parametrize(("asked", "used"), [(None, 1), (2, 2)])
def test_a_small_student_is_trained_in_one_thread_unless_the_option_is_set(frozen, asked, used):
    before = torch.get_num_threads()
    found = []
    config = distill_config(
        frozen, trainer=TrainerOptions(epochs=1, batch_size=8, num_threads=asked, device="cpu")
    )
    try:
        torch.set_num_threads(4)
        distill.run(config, lambda *_: found.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)

    assert found == [used]


@pytest.mark.parametrize(
    ("theirs", "policy", "spins"),
    [
        ({}, "PASSIVE", "2000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", "7"),
        pytest.param(
            {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", "30000000000", marks=pytest.mark.slow
        ),
    ],
)
def test_threads_of_openmp_soon_sleep_unless_the_user_says_otherwise(theirs, policy, spins):
    environment = {
        name: value for name, value in os.environ.items() if name not in THREAD_ENVIRONMENT
    }
    code = (
        "import sys; sys.argv = ['x', 'nonsense=1']\n"
        "from permafrost.cli import stage_main\n"
        "try: stage_main('verify')\n"
        f"finally: {LOAD_OPENMP}"
    )

    done = run_program(
        [sys.executable, "-c", code],
        env={**environment, **theirs, "OMP_DISPLAY_ENV": "verbose"},
        cwd=ROOT,
    )

    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
