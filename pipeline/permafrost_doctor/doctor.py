"""Say what this machine has, what a pass and a training would use of it, and what is missing.

    permafrost doctor
    permafrost doctor cluster=existing

Its output is the first thing to paste into a report of a bug. It names no file, no user and no host. Each GPU computes
one convolution. With cluster=existing, the hosts of a running Ray are counted, and no GPU of this machine is touched.

Reads   the versions of packages, /proc, the devices of torch, and with cluster=existing the resources of Ray
Writes  nothing
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from itertools import chain
from pathlib import Path

import torch

from permafrost.cluster.placement import count_actors, describe_cluster, place_actors
from permafrost.cluster.session import ray_session
from permafrost.core.errors import device_error
from permafrost.core.machine import memory_entry, usable_cores, usable_memory
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.models.compute import device_name, fastest_precision, unused_accelerator
from permafrost_doctor.options import DoctorConfig

_PACKAGE = "permafrost-kd"
_PACKAGES = (
    *("torch", "torchvision", "ray", "webdataset", "zarr", "kornia", "pyarrow", "numpy", "timm"),
    *("pillow", "simplejpeg"),
)
_DEVELOPMENT = ("all", "dev", "docs", "bench")
"""Extras that no command needs."""
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """Facts about a machine, by subject; empty where there is nothing to say."""

    permafrost: str
    """Version, and that of Python, the kernel and the processor."""
    packages: str
    """Versions of the packages on which results depend."""
    gpus: str
    """GPUs that torch can use, each with its memory, or why there are none."""
    cpu: str
    """Cores and memory of this process, within the limits of its container."""
    disk: str
    """Room for temporary files and in shared memory."""
    cluster: str
    """Hosts and GPUs of a running Ray; empty with cluster=local."""
    passes: str
    """Devices, teachers and precision of a pass."""
    trainings: str
    """Device, precision and threads of a training."""
    missing: str
    """Packages and resources that commands of this project would need and this machine lacks."""

    def printed(self) -> dict[str, str]:
        """Return the values for the terminal."""
        names = {"passes": "a pass", "trainings": "a training"}
        return {names.get(name, name): text for name, text in vars(self).items()}


def examine_machine(config: DoctorConfig) -> DoctorResult:
    """Examine this machine, or with cluster=existing a running Ray.

    Args:
        config: Options of the command.

    Raises:
        ClusterError: If cluster=existing and no Ray responds.
    """
    is_local = config.cluster.kind == "local"
    problems = list(_missing_extras())
    gpus = [
        _describe_gpu(number, problems, touch=is_local)
        for number in range(torch.cuda.device_count())
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cluster, where = "", f"on {device_name(device)}"
    teachers, share = count_actors(config.cluster), 1.0 if gpus else 0.0
    if not is_local:
        with ray_session(config.cluster, 0):
            cluster, share = describe_cluster(), place_actors(config.cluster, teachers)
        where = "on GPUs of the cluster" if share else "on CPUs of the cluster"
    each = f"cluster.gpus_per_actor={share:g}, " if share else ""
    return DoctorResult(
        permafrost=f"{version(_PACKAGE)} with Python {platform.python_version()} on {platform.platform()}",
        packages=", ".join(_versions()),
        gpus="; ".join(gpus) or _reason_without_gpus(),
        cpu=_describe_cpu(),
        disk=_describe_disks(problems),
        cluster=cluster,
        passes=f"{where}, cluster.actors={teachers}, {each}annotate.precision=float32 ({_alternatives(device)})",
        trainings=f"on {device_name(device)}, trainer.precision=float32 ({_alternatives(device)}), "
        f"{torch.get_num_threads()} threads of torch at most, {resolve_decode_threads(None)} that decode",
        missing="; ".join(problems) or "nothing",
    )


def _alternatives(device: torch.device) -> str:
    """Say what auto would take, and whether there is TF32."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return f"auto: {fastest_precision(device)}{', or tf32' if has_tf32 else ''}"


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            yield f"{package} {version(package)}"
    if torch.version.cuda or torch.version.hip:
        yield f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        yield f"cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]


def _describe_gpu(number: int, problems: list[str], *, touch: bool) -> str:
    """Describe a GPU, and add to the problems if it does not compute."""
    device = torch.device("cuda", number)
    try:
        name = f"{number}: {torch.cuda.get_device_name(device)}"
        if not touch:
            return name
        major, minor = torch.cuda.get_device_capability(device)
        images = torch.ones(1, 3, 8, 8, device=device)
        torch.nn.functional.conv2d(images, images[:, :, :3, :3]).sum().item()
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        problems.append(f"GPU {number} does not compute: {device_error(error) or error}")
        return f"{number}: fails"
    return f"{name}, {total / _GIB:.0f} GiB ({free / _GIB:.0f} free), capability {major}.{minor}"


def _reason_without_gpus() -> str:
    """Say why torch has no GPU."""
    if (other := unused_accelerator()) is not None:
        return f"none for passes, which do not run on {other}; trainer.device={other} trains on it"
    if not torch.version.cuda and not torch.version.hip:
        return "none: this torch is built without CUDA (TORCH_BACKEND=cu130 make install has another one)"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return f"none: CUDA_VISIBLE_DEVICES={hidden!r} hides them"
    if not Path("/dev/nvidia0").exists() and not Path("/dev/kfd").exists():
        return "none on this machine"
    return "none: this torch finds no driver that fits it (TORCH_BACKEND=cu126 make install has an older CUDA)"


def _describe_cpu() -> str:
    """Say how many cores and how much memory this process may use."""
    bytes_of = {name: memory_entry(name) / _GIB for name in ("MemTotal", "MemAvailable")}
    return (
        f"{usable_cores()} of {os.cpu_count()} cores, {usable_memory() / _GIB:.1f} of {bytes_of['MemTotal']:.1f} GiB "
        f"of memory, {bytes_of['MemAvailable']:.1f} available on the machine"
    )


def _describe_disks(problems: list[str]) -> str:
    """Say how much room there is, and add to the problems if loader processes have too little."""
    temporary = shutil.disk_usage(tempfile.gettempdir()).free
    text = f"{temporary / _GIB:.0f} GiB free for temporary files"
    if not Path("/dev/shm").is_dir():
        return text
    if (shared := shutil.disk_usage("/dev/shm").free) < _GIB:
        problems.append(
            f"shared memory of {shared / 2**20:.0f} MiB is little for trainer.loader_processes and for Ray (docker run "
            "--shm-size=8g)"
        )
    return f"{text}, {shared / _GIB:.1f} GiB of shared memory"


def _missing_extras() -> Iterator[str]:
    """Iterate over the extras of this project that are not installed, with the command that does it."""
    needed: dict[str, list[str]] = {}
    for requirement in requires(_PACKAGE) or ():
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in _DEVELOPMENT:
            needed.setdefault(extra[1], []).append(name[0])
    lacking: dict[str, list[str]] = {}
    for extra_name, packages in needed.items():
        for package in packages:
            try:
                metadata(package)
            except PackageNotFoundError:
                lacking.setdefault(extra_name, []).append(package)
    if lacking:
        packages = list(dict.fromkeys(chain.from_iterable(lacking.values())))
        yield f"optional packages of {', '.join(lacking)} (pip install {' '.join(packages)})"
