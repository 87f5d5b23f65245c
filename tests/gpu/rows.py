"""Rows of the table: precompute and students' steps on made-up JPEGs, in images per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from permafrost.annotation import teacher_pass
from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig, LabelsConfig
from permafrost.config.models import ModelConfig
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import gradcam
from permafrost.models.providers import build_model, freeze
from permafrost.store.reader import Store
from permafrost.store.record_form import ImageForm
from permafrost.training.targets import LiveTeacher
from permafrost_papers.bcos.options import BcosWeightsConfig
from tests.benchmarks.figures import in_turn
from tests.gpu.budget import Budget, SkippedError
from tests.gpu.outcomes import Row
from tests.gpu.scale import CLASSES, Scale
from tests.gpu.students import Student
from tests.gpu.timeline import Timeline, synchronize
from tests.gpu.utilization import UtilizationMeter
from tests.gpu.workplace import Workplace
from tests.support.images import decode_frame


def measure_rows(place: Workplace, budget: Budget, rows: list[Row]) -> None:
    """Measure all rows and append them. An error fails its row only."""
    for name, (measure, needed) in ROWS.items():
        started = time.monotonic()
        try:
            budget.require(2 if place.scale.is_tiny else needed)
            row = replace(measure(place), name=name)
        except SkippedError as skipped:
            row = Row(name=name, status="skip", reason=str(skipped))
        except Exception as error:
            row = Row(name=name, status="fail", reason=f"{type(error).__name__}: {error}")
        rows.append(replace(row, seconds=time.monotonic() - started))
        if place.device.type == "cuda":
            torch.cuda.empty_cache()


# ---- precompute ----------------------------------------------------------------------------------


def _precompute_row(
    place: Workplace, store: Path, name: str, teacher: ModelConfig, **options: Any
) -> Row:
    """Measure the command on a packed store against a bare loop of decoding and forward passes.

    The time begins with the first image. What comes before and after the shards happens once per pass of any size
    (building the network, its fingerprint, publishing) and is stated separately, because the bare loop has none of it.
    """
    count = Store(store).num_records()
    meter = UtilizationMeter(place.device)
    timelines: list[Timeline] = []
    once: list[float] = []

    def whole() -> None:
        timeline = Timeline(place.device)
        started = time.perf_counter()
        with (
            meter,
            timeline.watch(teacher_pass, "run_shards", "shards", device=False),
            timeline.watch(ImageForm, "decode", "host", device=False),
            timeline.watch(TeacherAnnotator, "inputs_of", "copy", device=True),
            timeline.watch(TeacherAnnotator, "_annotate_inputs", "compute", device=True),
        ):
            place.annotate(store, name, teacher, **options)
            synchronize(place.device)
        all_of_it = time.perf_counter() - started
        once.append(all_of_it - (timeline.last_end["shards"] - timeline.first_start["host"]))
        timelines.append(timeline)

    bare = BareLoop(place, store, teacher)
    if not place.scale.is_tiny:  # warm up on both sides: caches of files and of convolutions
        bare()
        whole()
    meter = UtilizationMeter(place.device)
    timelines.clear()
    once.clear()
    rounds = 1 if place.scale.is_tiny else 2
    pairs = in_turn(whole, bare, rounds, warm_up=0)
    ours = [pair[0] - extra for pair, extra in zip(pairs, once, strict=True)]
    parts = {"wall": sum(ours)}
    for part in ("host", "copy", "compute"):
        parts[part] = sum(timeline.seconds()[part] for timeline in timelines)
    return Row(
        name="",
        status="measured",
        reason=f"and {median(once):.2g} s once per pass",
        images_per_second=count / median(ours),
        baseline="bare loop",
        baseline_images_per_second=count / median(pair[1] for pair in pairs),
        milliseconds=_per_image(parts, rounds * count),
        utilization=meter.mean,
    )


class BareLoop:
    """Callable that decodes images in threads and runs forward passes only: no checks, explanations or files."""

    def __init__(self, place: Workplace, store: Path, teacher: ModelConfig) -> None:
        self.place = place
        self.model = freeze(build_model(teacher, CLASSES)).to(place.device)
        self.size = place.scale.input_size
        images = place.folder / f"{store.name}-images"
        self.files = sorted(images.rglob("*.jpg"))

    @torch.no_grad()
    def __call__(self) -> None:
        scale, device = self.place.scale, self.place.device
        frame = (scale.side, scale.side)
        logits = []
        with ThreadPoolExecutor(scale.decode_threads) as pool:
            decoded = pool.map(lambda p: decode_frame(p.read_bytes(), frame), self.files)
            while batch := list(islice(decoded, scale.batch_size)):
                inputs = torch.stack(batch).to(device).float() / 255
                inputs = torch.nn.functional.interpolate(inputs, (self.size, self.size))
                with torch.autocast(device.type, dtype=getattr(torch, scale.precision)):
                    logits.append(self.model(inputs).logits.float().cpu())
        assert sum(map(len, logits)) == len(self.files)


def precompute_resnet50(place: Workplace) -> Row:
    """Measure logits and GradCAM maps of ResNet-50."""
    return _precompute_row(place, place.store, "resnet50", place.scale.teacher)


def precompute_features(place: Workplace) -> Row:
    """Measure logits and features of the last stage of ResNet-50, of which the mirror image has its own."""
    outputs = {"outputs": ("logits", "features"), "features_stages": (-1,)}
    return _precompute_row(place, place.store, "features", place.scale.teacher, annotate=outputs)


def precompute_vit(place: Workplace) -> Row:
    """Measure logits and GradCAM maps of ViT-B/16."""
    return _precompute_row(place, place.store, "vit", place.scale.vit)


def precompute_bcos(place: Workplace) -> Row:
    """Measure logits and weights W of a B-cos ResNet-50."""
    return _precompute_row(
        place,
        place.bcos_store,
        "bcos",
        place.bcos_teacher,
        explainer=BcosWeightsConfig(),
        annotate={"batch_size": place.scale.bcos_batch_size},
    )


# ---- students ------------------------------------------------------------------------------------


def _steps_row(ours: Student, theirs: Student, baseline: str, host: float, scale: Scale) -> Row:
    """Measure steps of two students in turn.

    host  seconds per image in which one process reads and decodes the batches, which the steps do not contain
    """
    for student in (ours, theirs):
        student.step()
        student.step()
        synchronize(student.device)
    ours.timeline, ours.meter = Timeline(ours.device), UtilizationMeter(ours.device)
    pairs = in_turn(ours, theirs, scale.rounds, warm_up=0)
    own, other = (median(side) for side in zip(*pairs, strict=True))
    parts = ours.timeline.seconds()
    images = scale.rounds * ours.images
    parts["wall"] = sum(pair[0] for pair in pairs)
    parts["host"] = host * images
    return Row(
        name="",
        status="measured",
        images_per_second=ours.images / own,
        baseline=baseline,
        baseline_images_per_second=theirs.images / other,
        milliseconds=_per_image(parts, images),
        utilization=ours.meter.mean,
    )


def _resnet_student(
    place: Workplace, method: Any, teacher: LiveTeacher | None = None, **options: Any
) -> tuple[Student, float]:
    """Return a student of ResNet-50's pass, and the seconds per image in which its batches are read."""
    scale = place.scale
    if not place.has_pass(place.store, "resnet50"):
        place.annotate(place.store, "resnet50", scale.teacher)
    batches, host = place.batches(place.store, "resnet50", scale.batch_size, 4)
    student = Student(
        scale.student,
        method,
        batches,
        place.device,
        teacher=teacher,
        steps=scale.steps,
        input_size=scale.input_size,
        precision=scale.precision,
        **options,
    )
    return student, host


_E2KD = E2KDConfig(lambda_map=5.0)


def frozen_against_labels(place: Workplace) -> Row:
    """Measure frozen e2KD steps against steps on labels."""
    ours, host = _resnet_student(place, _E2KD)
    theirs, _ = _resnet_student(place, LabelsConfig())
    return _steps_row(ours, theirs, "labels", host, place.scale)


def frozen_against_live(place: Workplace) -> Row:
    """Measure frozen e2KD steps against e2KD with the teacher in the loop."""
    scale = place.scale
    network = freeze(build_model(scale.teacher, CLASSES)).to(place.device)
    teacher = LiveTeacher(
        "live",
        network,
        gradcam,
        (scale.input_size, scale.input_size),
        ComputeSettings(
            precision=getattr(torch, scale.precision), channels_last=place.device.type == "cuda"
        ),
        GradCamConfig(),
    )
    ours, host = _resnet_student(place, _E2KD)
    theirs, _ = _resnet_student(place, _E2KD, teacher)
    return _steps_row(ours, theirs, "live teacher", host, scale)


def deterministic_against_free(place: Workplace) -> Row:
    """Measure what trainer.deterministic costs."""
    ours, host = _resnet_student(place, _E2KD)
    theirs, _ = _resnet_student(place, _E2KD, deterministic=False)
    return _steps_row(ours, theirs, "trainer.deterministic=false", host, place.scale)


def compiled_against_eager(place: Workplace) -> Row:
    """Measure what trainer.compile gains."""
    if place.scale.is_tiny:
        raise SkippedError("compilation takes longer than the tests of these rows may")
    ours, host = _resnet_student(place, _E2KD, compiled=True)
    theirs, _ = _resnet_student(place, _E2KD)
    return _steps_row(ours, theirs, "trainer.compile=false", host, place.scale)


def bcos_student(place: Workplace) -> Row:
    """Measure frozen e2KD steps on W of B-cos networks against steps on labels."""
    scale = place.scale
    if not place.has_pass(place.bcos_store, "bcos"):
        raise SkippedError("needs the pass of the row of precompute with the same teacher")
    batches, host = place.batches(place.bcos_store, "bcos", scale.bcos_batch_size, 2)
    common: dict[str, Any] = {
        "steps": max(1, scale.steps // 2),
        "input_size": scale.input_size,
        "precision": scale.precision,
        "explainer": "bcos_weights",
    }
    ours, theirs = (
        Student(scale.bcos_student, method, batches, place.device, **common)
        for method in (E2KDConfig(lambda_map=5.0), LabelsConfig(loss="bce_offlabel"))
    )
    return _steps_row(ours, theirs, "labels", host, scale)


def _per_image(parts: dict[str, float], images: int) -> dict[str, float]:
    return {name: 1e3 * value / images for name, value in parts.items()}


Measure = Callable[[Workplace], Row]
ROWS: dict[str, tuple[Measure, float]] = {
    "precompute ResNet-50": (precompute_resnet50, 90),
    "frozen e2KD, ResNet-50 to ResNet-18": (frozen_against_labels, 40),
    "frozen e2KD, ResNet-50 to ResNet-18, against live": (frozen_against_live, 40),
    "frozen e2KD, ResNet-18, deterministic": (deterministic_against_free, 40),
    "precompute features of ResNet-50": (precompute_features, 90),
    "precompute ViT-B/16": (precompute_vit, 90),
    "precompute B-cos ResNet-50": (precompute_bcos, 60),
    "frozen e2KD, B-cos ResNet-50 to ResNet-18": (bcos_student, 60),
    "frozen e2KD, ResNet-18, compiled": (compiled_against_eager, 120),
}
"""Rows in the order in which they are measured, each with the seconds that it may take."""
