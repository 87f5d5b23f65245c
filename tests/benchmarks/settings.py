"""Speed of a pass and of steps in the precision and memory format of this processor, against plain float32.

Ours is the precision of `fastest_precision` in channels-last format, the baseline float32 in channels-first format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.config.explainers import GradCamConfig
from permafrost.config.methods import E2KDConfig
from permafrost.config.models import ModelConfig, TorchvisionModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.batches import Batch
from permafrost.models.compute import ComputeSettings, fastest_precision
from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store
from permafrost_transformers.options import TransformersModelConfig
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, TINY, images_of, pack, write_tars
from tests.benchmarks.steps import BATCH, STUDENT, Steps, read_batches
from tests.support.images import decode_frame

SIDE = 224
PASS_TEACHER = TorchvisionModelConfig(name="resnet50", classes=CLASSES, weights="random")
PASS_RECORDS = 16
PASS_ROUNDS = 8
LARGE_STUDENT = TorchvisionModelConfig(name="resnet18")
LARGE_BATCH = 16
STEP_ROUNDS = {LARGE_STUDENT: 8, STUDENT: 30}


def pass_figure(folder: Path) -> list[Figure]:
    """Measure the work of an actor on images of 224 pixels: reading, forward pass of a ResNet-50, maps and encoding."""
    torch.set_num_threads(1)
    store = pack(write_tars(folder / "tars", PASS_RECORDS, SIDE), folder / "store")
    pairs = in_turn(
        _annotation(store, PassOptions(precision=_fastest(), batch_size=PASS_RECORDS)),
        _annotation(store, PassOptions(channels_last=False, batch_size=PASS_RECORDS)),
        PASS_ROUNDS,
    )
    unit = {"unit": "ms/record", "scale": 1e3 / PASS_RECORDS}
    return [figure("pass_resnet50_224px_vs_plain", pairs, faster=True, aim=">= 2.5", **unit)]


def transformer_pass_figure(folder: Path) -> list[Figure]:
    """Measure the work of an actor with a ViT-B of transformers, against decoding and the library's forward pass."""
    torch.set_num_threads(1)
    tars = write_tars(folder / "tars", PASS_RECORDS, SIDE)
    store = pack(tars, folder / "store")
    config = transformers.ViTConfig(num_labels=CLASSES, architectures=["ViTForImageClassification"])
    network = transformers.ViTForImageClassification(config).eval()
    network.save_pretrained(folder / "vit")
    transformers.ViTImageProcessor().save_pretrained(folder / "vit")
    teacher = TransformersModelConfig(name=str(folder / "vit"), weights="pretrained")
    options = PassOptions(
        precision="float32", batch_size=PASS_RECORDS, outputs=("logits", "pooled")
    )

    @torch.no_grad()
    def bare_loop() -> object:
        frames = torch.stack([decode_frame(data, (SIDE, SIDE)) for data in images_of(tars)])
        return network((frames.float() / 255 - 0.5) / 0.5).logits.half()

    pairs = in_turn(_annotation(store, options, teacher), bare_loop, PASS_ROUNDS, warm_up=1)
    unit = {"unit": "ms/record", "scale": 1e3 / PASS_RECORDS}
    return [figure("pass_vit_b_224px_vs_library", pairs, faster=True, aim=">= 0.95", **unit)]


def _annotation(
    store: Store, options: PassOptions, teacher: ModelConfig = PASS_TEACHER
) -> Callable[[], object]:
    annotator = TeacherAnnotator(teacher, CLASSES, GradCamConfig(), options, store.size)
    shard = store.shards[0]
    keys = store.index.shard_keys(0)

    def annotate() -> object:
        frames = ShardFrames(store, shard, np.arange(PASS_RECORDS)).read(0, PASS_RECORDS)
        return annotator.annotate([frames], keys)

    return annotate


def step_settings_figures(folder: Path) -> list[Figure]:
    """Measure steps of frozen e2KD of a ResNet-18 at 224 pixels and of a ResNet-20 at 32 pixels."""
    large = read_batches(
        folder / "224",
        replace(TINY, input_size=SIDE),
        GradCamConfig(),
        side=SIDE,
        records=2 * LARGE_BATCH,
        batch=LARGE_BATCH,
    )
    small = read_batches(folder / "32", TINY, GradCamConfig(), records=4 * BATCH)
    return [
        _step_figure("step_resnet18_224px_vs_plain", LARGE_STUDENT, large, aim=">= 2.3"),
        _step_figure("step_resnet20_32px_vs_plain", STUDENT, small, aim=">= 1.5"),
    ]


def _step_figure(name: str, student: ModelConfig, batches: list[Batch], aim: str) -> Figure:
    suited = ComputeSettings(precision=getattr(torch, _fastest()), channels_last=True)
    ours, plain = (
        Steps(E2KDConfig(lambda_map=5.0), batches, student=student, settings=settings)
        for settings in (suited, ComputeSettings())
    )
    pairs = in_turn(ours, plain, STEP_ROUNDS[student], warm_up=2)
    records = len(batches[0].keys)
    return figure(name, pairs, faster=True, unit="ms/record", scale=1e3 / records, aim=aim)


def _fastest() -> str:
    return fastest_precision(torch.device("cpu"))
