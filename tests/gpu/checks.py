"""Checks of a device: what a GPU computes, and what it must not wait for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from permafrost.config.augment import AugmentOptions, MixConfig, PixelOperationConfig, PolicyConfig
from permafrost.core.batches import Batch
from permafrost.loading.geometry import view_images
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.transfer import move_batch
from permafrost.models.compute import ComputeSettings, deterministic_algorithms, float32_products
from permafrost.training.state import Training
from permafrost.training.step import train_step
from tests.gpu.budget import Budget, SkippedError
from tests.gpu.inputs import logits_of, pack, precompute_config, write_images
from tests.gpu.outcomes import CheckOutcome
from tests.gpu.ranks import build_tiny, gradient_of_ranks, loss_and_gradient
from tests.gpu.scale import CLASSES, TINY, Scale
from tests.support.batches import FRAME, random_batch
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.trainings import HostReads
from tests.support.verbs import precompute

Check = Callable[[torch.device, Scale], str]
"""Function that checks a device. It returns what it found, or raises SkippedError or AssertionError."""

PYTEST_CHECKS = (
    "tests/loading/test_transfer.py::test_a_gpu_receives_the_batches_of_the_host",
    "tests/training/test_compute_settings.py::test_a_step_on_a_gpu_never_waits",
)
"""Tests of the suite that are skipped without a GPU. They need none of the suite's fixtures."""

_PIXELS = AugmentOptions(
    operations=(
        PolicyConfig(kind="randaugment"),
        PixelOperationConfig(kind="color_jitter"),
        PixelOperationConfig(kind="grayscale"),
        PixelOperationConfig(kind="gaussian_blur", sigma=(0.02, 0.05)),
        PixelOperationConfig(kind="random_erasing"),
    ),
    mix=(MixConfig(kind="mixup"), MixConfig(kind="cutmix", p=0.5)),
)


def run_checks(
    checks: Mapping[Check, float],
    device: torch.device,
    scale: Scale,
    budget: Budget,
    outcomes: list[CheckOutcome],
) -> None:
    """Run checks, each with the seconds that it may take, and append their outcomes. An error fails its check only."""
    for check, seconds in checks.items():
        started = time.monotonic()
        status = "pass"
        try:
            budget.require(1 if scale.is_tiny else seconds)
            reason = check(device, scale)
        except SkippedError as skipped:
            status, reason = "skip", str(skipped)
        except Exception as error:
            status, reason = "fail", f"{type(error).__name__}: {error}"
        outcomes.append(
            CheckOutcome(
                name=check.__name__,
                status=status,
                reason=reason,
                seconds=time.monotonic() - started,
            )
        )


# ---- numbers -------------------------------------------------------------------------------------


def _compare(found: Training, wanted: Training, tolerance: float) -> str:
    """Compare loss and gradient of one batch in two trainings of equal weights."""
    own_loss, own = loss_and_gradient(found, random_batch(0))
    other_loss, other = loss_and_gradient(wanted, random_batch(0))
    distance = ((own - other).norm() / other.norm()).item()
    assert distance <= tolerance, f"gradient is {distance:.2g} away, more than {tolerance:g}"
    assert abs(own_loss - other_loss) <= tolerance * abs(other_loss), (
        f"loss is {own_loss:.6g} and not {other_loss:.6g}"
    )
    return f"gradient within {distance:.1e} of {tolerance:g}"


def device_equals_cpu(device: torch.device, scale: Scale) -> str:
    """Compare a frozen e2KD step on the device with one on the CPU, both in float32."""
    return _compare(build_tiny(device), build_tiny(torch.device("cpu")), 1e-3)


def float32_is_not_tf32(device: torch.device, scale: Scale) -> str:
    """Compare a convolution and a product in float32 with float64, and with TF32 where the device has it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 64, 16, 16, generator=generator).to(device)
    weights = torch.randn(64, 64, 3, 3, generator=generator).to(device)
    rows = images.flatten(2).transpose(1, 2)

    def errors(*, tf32: bool) -> list[float]:
        with float32_products(tf32=tf32):
            results = F.conv2d(images, weights), rows @ rows.transpose(1, 2)
        exact = (
            F.conv2d(images.double(), weights.double()),
            rows.double() @ rows.double().transpose(1, 2),
        )
        pairs = zip(results, exact, strict=True)
        return [((one - other).norm() / other.norm()).item() for one, other in pairs]

    largest = max(errors(tf32=False))
    assert largest < 1e-6, f"float32 has a relative error of {largest:.1e}"
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    smallest = min(errors(tf32=True)) if has_tf32 else 1.0
    assert smallest > 1e-5, f"TF32 has a relative error of {smallest:.1e} only"
    return f"float32 within {largest:.1e}" + (f", TF32 {smallest:.1e}" if has_tf32 else "")


def repeated_steps_are_equal(device: torch.device, scale: Scale) -> str:
    """Take the same steps twice with deterministic algorithms, with features that are pooled, and compare bits."""
    states = []
    for _ in range(2):
        training = build_tiny(device, ComputeSettings(precision=torch.bfloat16))
        with deterministic_algorithms(device):
            for seed in range(8):
                train_step(training, move_batch(random_batch(seed), device), FRAME, clip_norm=1.0)
        states.append({name: value.cpu() for name, value in training.model.state_dict().items()})
    unequal = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    assert unequal == [], f"the weights {', '.join(unequal[:5])} differ"
    return f"{len(states[0])} weights are equal after 8 steps, bit for bit"


def views_equal_those_of_the_cpu(device: torch.device, scale: Scale) -> str:
    """Compare images in views that are rendered on the device and on the CPU."""
    batch = random_batch(0)
    images = view_images(move_batch(batch, device), FRAME).cpu()
    distance = (images - view_images(batch, FRAME)).abs().max().item() * 255
    assert distance < 0.01, f"a pixel is {distance:.2g} levels of 255 away"
    return f"within {distance:.1e} levels of 255"


def _amp(device: torch.device, precision: torch.dtype, tolerance: float) -> str:
    settings = ComputeSettings(precision=precision)
    found = _compare(build_tiny(device, settings), build_tiny(device), tolerance)
    training = build_tiny(device, settings)
    before = [p.detach().clone() for p in training.model.parameters()]
    for seed in range(12):  # float16 skips steps until its scale fits
        train_step(training, move_batch(random_batch(seed), device), FRAME, clip_norm=1.0)
    parameters = list(training.model.parameters())
    assert all(p.isfinite().all() for p in parameters), "parameters are not finite after 12 steps"
    moved = any(not torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert moved, "12 steps changed no parameter"
    return found


def amp_bfloat16(device: torch.device, scale: Scale) -> str:
    """Compare a step under bfloat16 autocast with one in float32."""
    return _amp(device, torch.bfloat16, 0.1)


def amp_float16(device: torch.device, scale: Scale) -> str:
    """Compare a step under float16 autocast with one in float32."""
    return _amp(device, torch.float16, 0.02)


def channels_last(device: torch.device, scale: Scale) -> str:
    """Compare a step in channels-last format with one in the default format."""
    return _compare(
        build_tiny(device, ComputeSettings(channels_last=True)), build_tiny(device), 1e-3
    )


def compiled_step(device: torch.device, scale: Scale) -> str:
    """Compare a compiled student with a plain one."""
    if scale.is_tiny:
        raise SkippedError("a compilation takes longer than all of a tiny run")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SkippedError("torch.compile needs triton on a GPU; install it")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise SkippedError("torch.compile needs a C compiler; install gcc, or set CC")
    return _compare(build_tiny(device, ComputeSettings(compile=True)), build_tiny(device), 1e-3)


# ---- waiting -------------------------------------------------------------------------------------


def _steps_without_waiting(device: torch.device, batches: list[Batch]) -> str:
    """Take steps after two to warm up, in which a read from the device is an error."""
    training = build_tiny(device, ComputeSettings(precision=torch.bfloat16))
    for batch in batches[:2]:
        train_step(training, move_batch(batch, device), FRAME, clip_norm=1.0)
    if device.type != "cuda":
        with HostReads(training.optimizer) as reads:
            for batch in batches[2:]:
                train_step(training, batch, FRAME, clip_norm=1.0)
        assert reads.found == [], f"the host reads {', '.join(reads.found)}"
        return "no operation of the steps reads a value; a GPU would not be waited for"
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            train_step(training, move_batch(batch, device), FRAME, clip_norm=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{len(batches) - 2} steps without a synchronization"


def no_synchronization(device: torch.device, scale: Scale) -> str:
    """Take frozen e2KD steps in which the host never waits for the device."""
    return _steps_without_waiting(device, [random_batch(seed) for seed in range(6)])


def no_synchronization_with_pixels(device: torch.device, scale: Scale) -> str:
    """Take such steps on images that many operations of augment.operations disturb and that are mixed."""
    schedule = PixelAugmentSchedule(_PIXELS, 0)
    batches = [
        replace(random_batch(seed), pixel_augment=schedule.draw(0, 4 * seed, 4))
        for seed in range(6)
    ]
    return _steps_without_waiting(device, batches)


# ---- several processes ---------------------------------------------------------------------------


def nccl_ranks(device: torch.device, scale: Scale) -> str:
    """Compare the gradient of two ranks with that of one process."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise SkippedError(f"needs two GPUs, and there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        found = gradient_of_ranks(Path(folder), "nccl", "cuda", 60)
    return compare_ranks(found, device)


def compare_ranks(found: torch.Tensor, device: torch.device) -> str:
    """Compare the gradient of ranks with that of one process on the whole batch."""
    _, wanted = loss_and_gradient(build_tiny(device), random_batch(0))
    distance = ((found - wanted).norm() / wanted.norm()).item()
    assert distance <= 1e-3, f"the gradient of two ranks is {distance:.2g} away from one process"
    return f"gradient within {distance:.1e} of one process"


def ray_actors_on_a_share(device: torch.device, scale: Scale) -> str:
    """Compare a pass of two Ray actors on half a GPU each with that of this process."""
    if importlib.util.find_spec("ray") is None:
        raise SkippedError("Ray is missing; install ray[data,train,default]")
    if device.type != "cuda":
        raise SkippedError("needs a GPU to share")
    return compare_ray(gpus_per_actor=0.5)


def compare_ray(gpus_per_actor: float) -> str:
    """Compute a tiny pass with two Ray actors in a process of their own, and compare its logits."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.gpu.checks import run_on_ray\n"
        "run_on_ray(Path(sys.argv[1]), float(sys.argv[2]))\n"
    )
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        scale = replace(TINY, images=300)  # two shards
        store = Path(folder) / "store"
        pack(write_images(Path(folder) / "images", scale.images, 8, scale.side), store, scale)
        command = [sys.executable, "-c", script, str(store), str(gpus_per_actor)]
        _run(command, 110)
        found = logits_of(store, "ray")
        shutil.rmtree(store / "teachers")  # an equal pass of another name is not computed again
        annotate = {"name": "serial", "batch_size": 16}
        precompute.run(precompute_config(store, scale, teacher=scale.teacher, annotate=annotate))
        wanted = logits_of(store, "serial")
    assert found.shape == wanted.shape == (scale.images, 1, CLASSES), f"{found.shape} are stored"
    distance = np.abs(found.astype("f4") - wanted.astype("f4")).max()
    assert distance <= 1e-2, f"logits differ by {distance:.2g}"
    return f"two actors, logits within {distance:.1e} of this process"


def run_on_ray(store: Path, gpus_per_actor: float) -> None:
    """Compute the pass `ray` with two actors."""
    from permafrost.config.cluster import LocalClusterConfig

    config = precompute_config(
        store, TINY, teacher=TINY.teacher, annotate={"name": "ray", "batch_size": 16}
    )
    cluster = LocalClusterConfig(actors=2, cpus_per_actor=0.5, gpus_per_actor=gpus_per_actor)
    precompute.run(replace(config, executor="ray", cluster=cluster))


def tests_of_the_suite(device: torch.device, scale: Scale) -> str:
    """Run the tests of the suite that need a GPU."""
    if device.type != "cuda":
        raise SkippedError("these tests need a GPU")
    if importlib.util.find_spec("pytest") is None:
        raise SkippedError("pytest is missing; install it")
    return run_pytest()


def run_pytest() -> str:
    """Run these tests without the suite's options and fixtures, which need plug-ins and Ray; return the summary."""
    options = ("-q", "-c", os.devnull, "--rootdir", str(ROOT), "--noconftest")
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", *PYTEST_CHECKS]
    return _run(command, 60).splitlines()[-1]


def _run(command: list[str], seconds: float) -> str:
    """Run a command in the repository for a limited time. Raises AssertionError with its last lines if it fails."""
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"did not finish within {seconds:.0f} s") from error
    last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    assert done.returncode == 0, f"exit code {done.returncode}: {last}"
    return done.stdout.strip()


QUICK_CHECKS: dict[Check, float] = {
    device_equals_cpu: 20,
    float32_is_not_tf32: 5,
    repeated_steps_are_equal: 10,
    views_equal_those_of_the_cpu: 5,
    amp_bfloat16: 10,
    amp_float16: 10,
    channels_last: 10,
    no_synchronization: 10,
    no_synchronization_with_pixels: 10,
}
"""Checks that run before the rows, each with the seconds that it may take."""
SLOW_CHECKS: dict[Check, float] = {
    compiled_step: 90,
    tests_of_the_suite: 70,
    nccl_ranks: 70,
    ray_actors_on_a_share: 130,
}
"""Checks that start processes or compile, which run in the time that the rows leave."""
