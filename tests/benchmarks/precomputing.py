"""Cost of precomputing, relative to the bare loop over the same images that is its lower bound."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from permafrost.config.models import CifarModelConfig, ModelConfig
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import forward_to_explain, needs_graph
from permafrost.models.providers import build_model, freeze
from permafrost_papers.bcos.weight_maps import bcos_weights
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, images_of, pack, precompute_config, write_tars
from tests.support.images import decode_frame
from tests.support.verbs import precompute

RECORDS = 3000
ROUNDS = 5
TEACHER = CifarModelConfig(name="resnet20", classes=CLASSES, weights="random")
BATCH = 64


def precompute_figures(folder: Path) -> list[Figure]:
    """Measure precompute against a bare loop, and GradCAM against logits alone."""
    tars, store = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    pack(tars, store)
    whole, logits = (
        annotator(tars, store, RECORDS, teacher=TEACHER, outputs=outputs)
        for outputs in (("logits", "maps"), ("logits",))
    )
    per_record = {"unit": "ms/record", "scale": 1e3 / RECORDS}
    return [
        figure(
            "precompute_vs_bare_loop",
            in_turn(whole, lambda: bare_loop(tars, RECORDS, TEACHER), ROUNDS),
            faster=True,
            aim=">= 0.95",
            **per_record,
        ),
        figure(
            "gradcam_vs_logits",
            in_turn(whole, logits, ROUNDS),
            faster=False,
            aim="<= 1.05",
            **per_record,
        ),
    ]


def annotator(tars: Path, store: Path, records: int, **options: Any) -> Callable[[], Any]:
    """Return a function that runs the whole command on a packed store: source, plan, teacher, commits, manifest."""
    config = precompute_config(tars, store, **options)

    def run() -> None:
        shutil.rmtree(store / "teachers", ignore_errors=True)
        assert precompute.run(config).teacher_records == records

    return run


@torch.no_grad()
def bare_loop(tars: Path, records: int, teacher: ModelConfig) -> list[torch.Tensor]:
    """Decode and run the forward pass only, in the memory format of precompute, without checks or files.

    The explanations of a B-cos network are computed, because they take a second pass through the whole network. GradCAM
    is not, because it takes no time in comparison.
    """
    torch.set_num_threads(1)
    model = freeze(build_model(teacher, CLASSES))
    settings = ComputeSettings(channels_last=teacher.suits_channels_last)
    settings.set_memory_format(model)
    logits = []
    for frames in _batches(tars):
        output = forward_to_explain(model, frames.float() / 255, settings=settings)
        if needs_graph(model):
            bcos_weights(model, output, output.logits.argmax(dim=1, keepdim=True))
        logits.append(output.logits.detach().half())
    assert sum(map(len, logits)) == records
    return logits


def _batches(tars: Path) -> Iterator[torch.Tensor]:
    frames: list[torch.Tensor] = []
    for data in images_of(tars):
        frames.append(decode_frame(data, (32, 32)))
        if len(frames) == BATCH:
            yield torch.stack(frames)
            frames = []
    if frames:
        yield torch.stack(frames)
