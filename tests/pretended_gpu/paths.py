"""Paths of precompute, distill and evaluate that run on the pretended GPU, each with what it asked of the device.

A training's numbers are those of one step, the third one or a later one; a pass's are those of all its batches.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretended_gpu import device
from tests.pretended_gpu.device import RECORD, DeviceTensor

device.install()

from permafrost.annotation.annotator import TeacherAnnotator  # noqa: E402
from permafrost.annotation.shard_tasks import AnnotateShard  # noqa: E402
from permafrost.config.store import StoreOptions  # noqa: E402
from permafrost.training import loop  # noqa: E402
from tests.support.kills import killed_at  # noqa: E402
from tests.support.runs import evaluate_config  # noqa: E402
from tests.support.settings import (  # noqa: E402
    E2KD,
    FROZEN,
    MAPS,
    PASSES,
    TRAININGS,
    pass_config,
    training_config,
)
from tests.support.stores import Frozen, precompute_config  # noqa: E402
from tests.support.verbs import distill, evaluate, precompute  # noqa: E402

TABLE = Path(__file__).with_name("table.json")
"""File of the numbers of all paths, as they were last written."""
Numbers = dict[str, Any]
Runner = Callable[[], Numbers]


# ---- passes --------------------------------------------------------------------------------------


def run_pass(name: str, explainer: Any = None, **options: Any) -> Numbers:
    """Write a pass, and return what all its batches asked of the device."""
    waits, batches = 0, 0
    annotate_shard, compute = AnnotateShard.__call__, TeacherAnnotator._annotate_batch
    first: list[int] = []
    """Waits before the first batch of a shard, when its teacher is built."""

    def counted(task: Any, shard: Any) -> Any:
        nonlocal waits, batches
        first.clear()
        result = annotate_shard(task, shard)
        waits += len(RECORD.waits) - first[0]
        batches += len(first)
        first.clear()
        return result

    def count_batch(annotator: Any, *words: Any) -> Any:
        first.append(len(RECORD.waits))
        return compute(annotator, *words)

    RECORD.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnnotateShard, "__call__", counted)
        patch.setattr(TeacherAnnotator, "_annotate_batch", count_batch)
        precompute.run(pass_config(name, explainer, **options))
    return {
        "waits_a_batch": waits / batches,
        "launches": RECORD.launches.total(),
        "waits": len(RECORD.waits),
        "uploaded": sum(size for size, _ in RECORD.uploads),
        "downloaded": sum(RECORD.downloads),
        "unrepeatable": sorted(RECORD.unrepeatable),
    }


# ---- trainings -----------------------------------------------------------------------------------


@contextmanager
def recorded_steps(steps: list[Numbers]) -> Iterator[None]:
    """Append what each step of a training asks of the device."""
    original = loop.train_step

    def step(training: Any, *arguments: Any, **options: Any) -> Any:
        for parameter in training.model.parameters():
            assert isinstance(parameter, DeviceTensor), "the model is not on the device"
        if not steps:
            RECORD.unrepeatable.clear()  # of the examination of the network, which is for shapes
        waits, launches = len(RECORD.waits), RECORD.launches.total()
        terms = original(training, *arguments, **options)
        thread = threading.current_thread().name
        here = [wait for wait in RECORD.waits[waits:] if wait[2] == thread]
        steps.append({"launches": RECORD.launches.total() - launches, "waits": here})
        return terms

    loop.train_step = step
    try:
        yield
    finally:
        loop.train_step = original


def run_training(name: str, method: Any, **options: Any) -> Numbers:
    """Train a student, and return what a later step asks of the device."""
    steps: list[Numbers] = []
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    RECORD.clear()
    with recorded_steps(steps):
        distill.run(training_config(name, method, **options))
    assert len(steps) >= 4, len(steps)
    copying = [
        wait
        for wait in RECORD.waits
        if wait[0].startswith("upload") and wait[1].startswith("permafrost/loading/transfer")
    ]
    waits = Counter(f"{why} ({line})" for step in steps[2:] for why, line, _ in step["waits"])
    waits += Counter(f"{why} ({line})" for why, line, _ in copying)
    uploads = (size for size, line in RECORD.uploads if line.startswith("permafrost/loading"))
    return {
        "launches": steps[-1]["launches"],
        "waits": dict(sorted(waits.items())),
        "uploaded": sum(uploads) / len(steps),
        "unrepeatable": sorted(RECORD.unrepeatable),
    }


FEW = (
    *(f"pass.{name}" for name in ("frozen", "several_classes", "views", "strong_views")),
    "pass.mixed_views",
    *("labels", "kd", "e2kd", "features", "kd.live", "e2kd.live", "e2kd.replay", "e2kd.mixed"),
    *("e2kd.replay.strong", "several", "e2kd.bfloat16", "e2kd.free", "evaluate", "resume"),
    *("precision", "devices"),
)
"""Paths of `make test`; the slow tests run all."""


# ---- evaluation and resumption -------------------------------------------------------------------


def evaluate_student() -> Numbers:
    """Evaluate a student by all evaluators that run by default."""
    config = precompute_config(Path("store"), FROZEN)
    distill.run(training_config("evaluated", E2KD))
    from permafrost.store.reader import Store

    RECORD.clear()
    evaluate.run(
        replace(
            evaluate_config(Frozen(Store("store"), config), run="evaluated", splits=("test",)),
            store=StoreOptions(path="store", teacher=("frozen",)),
        )
    )
    return {"launches": RECORD.launches.total(), "downloaded": sum(RECORD.downloads)}


def resume_training() -> Numbers:
    """Compare the weights of a training that was interrupted with those of one that was not."""
    trainer = {"checkpoint_every_steps": 2}
    distill.run(training_config("whole", E2KD, trainer=trainer))
    with killed_at(loop, "train_step", 7):
        distill.run(training_config("killed", E2KD, trainer=trainer))
    distill.run(training_config("killed", E2KD, trainer=trainer))
    weights = [
        (Path("runs") / run / "distill/model.safetensors").read_bytes()
        for run in ("whole", "killed")
    ]
    return {"equal": weights[0] == weights[1]}


def record_precision() -> Numbers:
    """Return the precisions that a pass and a student of TF32 name, and the lines that refuse it on a CPU."""
    from permafrost.core.errors import UserError
    from permafrost.store.reader import Store

    run_pass("tf32", **MAPS, precision="tf32")
    manifest = Store("store").open_pass("tf32").manifest
    run_training("tf32", E2KD, trainer={"precision": "tf32"})
    student = json.loads(Path("runs/tf32/distill/model.json").read_text())
    try:
        distill.run(training_config("cpu", E2KD, trainer={"precision": "tf32", "device": "cpu"}))
        refusal = ""
    except UserError as error:
        refusal = str(error)
    agreement = manifest.agreement
    return {
        "pass": manifest.teacher["dtype"],
        "compared": agreement is not None and agreement.precision,
        "student": student["precision"],
        "refusal": refusal,
    }


def record_devices() -> Numbers:
    """Return the devices of two passes: of a driver without a GPU whose actors have one, and the reverse."""
    from permafrost.annotation.shard_tasks import AnnotateShard
    from permafrost.store.reader import Store

    recorded = {}
    for name, on_driver, on_actor in (("actors", False, True), ("driver", True, False)):
        present = {"gpu": on_driver}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda present=present: present["gpu"])
            annotate = AnnotateShard.__call__

            def on_worker(
                task: Any, shard: Any, annotate: Any = annotate, present: Any = present
            ) -> Any:
                driver, present["gpu"] = present["gpu"], on_actor  # noqa: B023
                try:
                    return annotate(task, shard)
                finally:
                    present["gpu"] = driver

            patch.setattr(AnnotateShard, "__call__", on_worker)
            run_pass(f"gpu_of_{name}", outputs=("logits", "pooled")[: 1 + on_driver])
        recorded[name] = Store("store").open_pass(f"gpu_of_{name}").manifest.made_with["device"]
    return recorded


def paths() -> dict[str, Runner]:
    """Return all paths by name, passes first."""
    return {
        **{f"pass.{name}": partial(run_pass, name, **options) for name, options in PASSES.items()},
        **{name: partial(run_training, name, **options) for name, options in TRAININGS.items()},
        "evaluate": evaluate_student,
        "resume": resume_training,
        "precision": record_precision,
        "devices": record_devices,
    }


def main(words: Iterable[str]) -> None:
    """Run paths in a temporary folder, and print or write what they ask of the device."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # type: ignore[assignment]
    chosen = FEW if "--few" in words else [word for word in words if word != "--write"]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pretended-") as folder:
        os.chdir(folder)
        for name, run in paths().items():
            if chosen and name not in chosen:
                continue
            started = time.process_time()
            try:
                results[name] = run()
            except Exception as error:  # of this path alone
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {time.process_time() - started:.2f} s", file=sys.stderr)
        text = json.dumps({"torch": torch.__version__, "paths": results}, indent=1)
        if "--write" in words:
            TABLE.write_text(text + "\n")
        else:
            print(text, flush=True)
    os._exit(0)  # torch cannot take tensors apart whose device was never there
