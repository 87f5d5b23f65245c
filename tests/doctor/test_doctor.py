"""Examination of this machine, of a pretended one and of a broken one by `permafrost doctor`."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch

import permafrost_doctor.doctor as doctor
from permafrost.core import machine
from permafrost.core.machine import usable_cores
from permafrost_doctor.options import DoctorConfig


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of which torch tells, whose convolutions a CPU computes."""
    answers = {
        "device_count": 2,
        "is_available": True,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (9, 0),
        "mem_get_info": (70 * 2**30, 80 * 2**30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: ones(*shape))


def test_versions_cores_and_precision_of_this_machine():
    result = doctor.examine_machine(DoctorConfig())
    assert f"torch {torch.__version__.partition('+')[0]}" in result.packages
    assert f"{usable_cores()} of {os.cpu_count()} cores" in result.cpu
    assert "cluster.actors=" in result.passes
    assert "trainer.precision=float32" in result.trainings
    assert result.cluster == ""


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
@pytest.mark.parametrize(
    ("hidden", "cuda", "reason"),
    [
        (None, "13.2", "none on this machine"),
        ("", "13.2", "CUDA_VISIBLE_DEVICES='' hides them"),
        (None, None, "built without CUDA"),
    ],
)
def test_why_there_is_no_gpu(monkeypatch, hidden, cuda, reason):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert reason in doctor.examine_machine(DoctorConfig()).gpus


def test_gpus_and_what_uses_them(gpus):
    result = doctor.examine_machine(DoctorConfig())
    assert result.gpus.startswith("0: NVIDIA H100 80GB HBM3, 80 GiB (70 free), capability 9.0; 1: ")
    assert "cluster.actors=2, cluster.gpus_per_actor=1, annotate.precision=float32" in result.passes
    assert "auto: bfloat16, or tf32" in result.passes
    assert "on NVIDIA H100" in result.trainings
    assert "GPU" not in result.missing


def test_a_gpu_that_does_not_compute_is_a_problem(gpus, monkeypatch):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
    result = doctor.examine_machine(DoctorConfig())
    assert result.gpus == "0: fails; 1: fails"
    assert (
        "GPU 0 does not compute: the device does not compute (CUDA error: no kernel"
        in result.missing
    )


def test_the_limits_of_a_container_and_little_shared_memory_are_said(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB",
        "/proc/self/cgroup": "0::/",
        "/sys/fs/cgroup/memory.max": str(4 * 2**30),
        "/sys/fs/cgroup/cpu.max": "150000 100000",
    }
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda _: doctor.shutil._ntuple_diskusage(0, 0, 64 * 2**20)
    )
    result = doctor.examine_machine(DoctorConfig())
    assert result.cpu == "2 of 32 cores, 4.0 of 32.0 GiB of memory, 16.0 available on the machine"
    assert "shared memory of 64 MiB is little" in result.missing


def test_extras_that_are_missing_are_named_with_the_command(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "requires",
        lambda _: ["torch", 'nothere>=1 ; extra == "hub"', 'torch ; extra == "x"'],
    )
    assert list(doctor._missing_extras()) == ["optional packages of hub (pip install nothere)"]


def test_no_name_of_a_user_a_host_or_a_folder_is_printed():
    text = " ".join(doctor.examine_machine(DoctorConfig()).printed().values())
    for name in (str(Path.home()), str(Path.cwd()), str(Path(metadata.__file__).parent)):
        assert name not in text
    assert (
        re.search(re.escape(os.uname().nodename) + r"\b", text) is None
        or len(os.uname().nodename) < 4
    )
