"""Profiles of commands: exclusive wall seconds of their parts, by name.

    python -m tests.benchmarks profile            (about 4 minutes; only if it is named)
    python -m tests.benchmarks profile.step

Every profile is of one process with one torch thread, and of the thread that runs the command: what other threads do
meanwhile is a part only while that thread waits for it. What no part covers is a row of its own, "the rest".
"""

from __future__ import annotations

import importlib
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from permafrost.config.compose import compose
from permafrost.config.paths import place_paths
from permafrost.config.verbs import build_verb_config
from tests.benchmarks.inputs import write_tars
from tests.support.verbs import distill, precompute, report, sweep, teach

RESULTS = Path(__file__).with_name("profiles.json")
Part = tuple[str, str, str]
"""Module or module:class, function, and the part that its calls are counted as."""

READING: tuple[Part, ...] = (
    ("permafrost.loading.dataset:StoreDataset", "_decode", "reading and decoding images"),
    (
        "permafrost.loading.dataset:StoreDataset",
        "__getitems__",
        "reading targets, labels and index",
    ),
)
STEP: tuple[Part, ...] = (
    *READING,
    ("permafrost.training.step", "view_images", "warp of the images"),
    ("permafrost.loading.geometry", "_with_maps", "warp of the maps"),
    ("permafrost.training.step", "run_student", "forward pass"),
    ("torch.autograd", "_engine_run_backward", "backward pass"),
    ("permafrost.losses.base:DistillationLoss", "forward", "loss"),
    ("torch.nn.utils", "clip_grad_norm_", "clipping"),
    ("torch.optim.adamw:AdamW", "step", "optimizer"),
    ("permafrost.training.loop", "train_step", "explanation of the student, bookkeeping of a step"),
    ("permafrost.training.loop", "save_checkpoint", "checkpoints"),
    ("permafrost.training.loop", "build_training", "building the network and its optimizer"),
)
PRECOMPUTE: tuple[Part, ...] = (
    ("concurrent.futures:Future", "result", "waiting for images"),
    (
        "permafrost.annotation.annotator:TeacherAnnotator",
        "inputs_of",
        "warp to the teacher's input",
    ),
    ("permafrost.models.classifier:Classifier", "forward", "forward pass"),
    ("permafrost.annotation.annotator:TeacherAnnotator", "_annotate_inputs", "explanation"),
    ("permafrost.annotation.annotator:TeacherAnnotator", "_annotate_batch", "encoding, fidelity"),
    ("permafrost.annotation.shard_tasks:AnnotateShard", "__call__", "writing"),
    ("permafrost.annotation.annotator", "build_model", "building the teacher"),
)
PACK: tuple[Part, ...] = (
    ("permafrost_sources.demo:DemoSource", "read", "drawing"),
    ("permafrost_sources.demo:DemoSource", "records", "listing"),
    ("permafrost.store.image_shards", "inspect_image", "checking the images"),
    ("permafrost.store.pack:PackShard", "__call__", "writing"),
)
REPORT: tuple[Part, ...] = (
    ("permafrost_report.page", "render_page", "page and its figures"),
    ("permafrost_report.case_pictures", "show_cases", "networks on the cases"),
    ("permafrost_report.provenance", "network_rows", "sizes of the networks"),
)
EVALUATION: tuple[Part, ...] = (
    ("permafrost.evaluation.run", "run_evaluators", "evaluators"),
    ("permafrost.evaluation.forward", "evaluate_model", "evaluation of the teacher"),
)


@dataclass(frozen=True)
class Profile:
    """Seconds of a command by part, in falling order."""

    name: str
    seconds: float
    """Wall time of the whole command."""
    parts: dict[str, float]

    @property
    def rest(self) -> float:
        """Seconds that no part covers."""
        return self.seconds - sum(self.parts.values())


class Stopwatch:
    """Exclusive seconds by part: the time of a call without that of the parts it calls.

    Calls on other threads than the one that makes the stopwatch are not counted.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._thread = threading.get_ident()
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds of the block."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def watch(self, stack: ExitStack, parts: Sequence[Part]) -> None:
        """Count all calls of the functions of `parts` until the stack is closed."""
        for place, name, part in parts:
            module, _, member = place.partition(":")
            owner = importlib.import_module(module)
            stack.enter_context(
                self._watched(getattr(owner, member) if member else owner, name, part)
            )

    def _watched(self, owner: Any, name: str, part: str) -> Any:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*arguments, **options)
            with self.part(part):
                return original(*arguments, **options)

        return mock.patch.object(owner, name, watched)


def profile(name: str, command: Callable[[], Any], parts: Sequence[Part]) -> Profile:
    """Run a command once and measure its parts."""
    torch.set_num_threads(1)
    watch = Stopwatch()
    with ExitStack() as stack:
        watch.watch(stack, parts)
        started = time.perf_counter()
        command()
        seconds = time.perf_counter() - started
    falling = sorted(watch.seconds.items(), key=lambda item: -item[1])
    return Profile(name, seconds, dict(falling))


# ---- profiles ------------------------------------------------------------------------------------


def _config(verb: str, *words: str) -> Any:
    return place_paths(build_verb_config(verb, compose(verb, list(words))))


def _photographs(folder: Path, records: int) -> list[str]:
    tars = write_tars(folder / "tars", records, 224)
    return [
        "data=webdataset",
        f"data.path={tars}",
        f"store.path={folder / 'store'}",
        f"run={folder / 'run'}",
    ]


_TEACHER = (
    "teacher=torchvision",
    "teacher.name=resnet50",
    "teacher.weights=random",
    "teacher.classes=10",
)


def profile_precompute(folder: Path) -> list[Profile]:
    """Profile the pass of a ResNet-50 with GradCAM on packed images of 224 pixels."""
    words = [*_photographs(folder, 128), "executor=serial"]
    precompute.run(_config("precompute", *words, "teacher=none"))
    command = partial(precompute.run, _config("precompute", *words, *_TEACHER))
    return [profile("precompute", command, PRECOMPUTE)]


def profile_step(folder: Path) -> list[Profile]:
    """Profile frozen e2KD of a ResNet-18 on images of 224 pixels and that pass."""
    words = _photographs(folder, 128)
    tiny = [f"teacher.{option}" for option in ("name=resnet18", "weights=random", "classes=10")]
    precompute.run(_config("precompute", *words, "executor=serial", "teacher=torchvision", *tiny))
    config = _config(
        "distill", *words[2:], "student=torchvision", "student.name=resnet18", "method=e2kd",
        "augment=resized_crop_flip", "augment.size=224", "trainer.epochs=2", "trainer.batch_size=32",
        "trainer.num_threads=1", "optimizer.lr=0.001",
    )  # fmt: skip
    return [profile("step", partial(distill.run, config), STEP)]


def profile_demo(folder: Path) -> list[Profile]:
    """Profile the stages of the demo in this process, with one seed of its students."""
    words = ["experiment=demo"]
    serial = [*words, "executor=serial"]
    students = [*serial, "seeds=[0]"]
    one_thread = "teaching.trainer.num_threads=1"

    def pack() -> None:
        precompute.run(_config("precompute", *serial, "teacher=none"))

    def train_teacher() -> None:
        teach.run(_config("teach", *words, one_thread))

    def annotate() -> None:
        precompute.run(_config("precompute", *serial))

    def train_students() -> None:
        sweep.run(_config("sweep", *students), students)

    def write_report() -> None:
        report.run(_config("report", *words))

    with chdir(folder):  # a sweep lists its students by relative paths
        return [
            profile("demo.pack", pack, PACK),
            profile("demo.teach", train_teacher, (*STEP, *EVALUATION)),
            profile("demo.pass", annotate, PRECOMPUTE),
            profile("demo.sweep", train_students, (*STEP, *EVALUATION)),
            profile("demo.report", write_report, REPORT),
        ]


PROFILES: dict[str, Callable[[Path], list[Profile]]] = {
    "profile.precompute": profile_precompute,
    "profile.step": profile_step,
    "profile.demo": profile_demo,
}


def measure(words: Sequence[str]) -> list[Profile]:
    """Measure the profiles whose names begin with one of the words."""
    found: list[Profile] = []
    for name, profiled in PROFILES.items():
        if any(name.startswith(word) for word in words):
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                found += profiled(Path(folder))
    return found


def markdown(profiles: Sequence[Profile]) -> str:
    """Markdown table of all profiles: seconds and fraction of each part."""
    lines = ["| | part | s | % |", "|---|---|---|---|"]
    for one in profiles:
        lines.append(f"| {one.name} | all | {one.seconds:.1f} | |")
        parts = {**one.parts, "the rest": one.rest}
        lines += [
            f"| | {part} | {seconds:.2f} | {100 * seconds / one.seconds:.0f} |"
            for part, seconds in parts.items()
        ]
    return "\n".join(lines) + "\n"


def load() -> list[Profile]:
    """Read the recorded profiles."""
    return [Profile(**values) for values in json.loads(RESULTS.read_text())]
