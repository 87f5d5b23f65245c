"""Agreement of passes in bfloat16 with float32, for six networks that are trained here on the demo's digits.

    python -m tests.benchmarks fidelity            (about 20 minutes; only if it is named)

What a pass would store is compared as it is before a pass of lower precision begins (annotation/precision.py), but
without limits.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from permafrost.annotation.pass_plan import plan_pass
from permafrost.annotation.precision import PRECISION_RECORDS, ComparePrecision
from permafrost.annotation.samples import measure_sample, select_sample
from permafrost.config.compose import compose
from permafrost.config.paths import with_absolute_paths
from permafrost.config.verbs import build_verb_config
from permafrost.core.tasks import SerialExecutor
from permafrost.models.resolve import resolve_precompute
from permafrost.store.manifest import Agreement
from permafrost.store.reader import Store
from tests.support.verbs import precompute, teach

logger = logging.getLogger("permafrost.bench")

RESULTS = Path(__file__).with_name("fidelity.json")
NETWORKS: dict[str, tuple[str, ...]] = {
    "ResNet-18": ("teacher=torchvision", "teacher.name=resnet18", "teacher.input_size=64"),
    "DenseNet-121": ("teacher=torchvision", "teacher.name=densenet121", "teacher.input_size=64"),
    "ConvNeXt-T": ("teacher=torchvision", "teacher.name=convnext_tiny", "teacher.input_size=64"),
    "ViT-T/16": ("teacher=timm", "teacher.name=vit_tiny_patch16_224", "teacher.input_size=64"),
    "ResNet-20 of CIFAR": ("teacher=cifar", "teacher.name=resnet20"),
    "B-cos ResNet-20": ("teacher=bcos", "teacher.name=resnet20"),
}
"""Networks by the words that choose them. The maps of B-cos networks are computed in float32 in any precision."""
TRAINING = ("teaching.split=teacher", "teaching.trainer.epochs=3")
_LARGE, _SLOW = "teaching.augment.size=64", "teaching.optimizer.lr=5e-4"
OWN_TRAINING = {
    "ResNet-18": (_LARGE,),
    "DenseNet-121": (_LARGE,),
    "ConvNeXt-T": (_LARGE, _SLOW, "teaching.trainer.epochs=6"),
    "ViT-T/16": (_LARGE, _SLOW, "teaching.trainer.epochs=15"),
}


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of one network, and its accuracy on the split that is named test."""

    network: str
    accuracy: float
    agreement: Agreement


def measure(words: Sequence[str]) -> list[Fidelity]:
    """Train and compare all networks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fidelity-") as folder, chdir(folder):
        precompute.run(_config("precompute", ["data=demo", "teacher=none", "run=store"]))
        measured = []
        for name, network in NETWORKS.items():
            logger.info("training and comparing %s", name)
            measured.append(_measure(name, network, f"run=network-{len(measured)}"))
    return measured


def _measure(name: str, network: Sequence[str], run: str) -> Fidelity:
    trained = teach.run(_config("teach", [*network, run, *TRAINING, *OWN_TRAINING.get(name, ())]))
    outputs = ["annotate.outputs=[logits]"] if "teacher=bcos" in network else []
    words = ["data=demo", *network, run, f"teacher.weights={trained.weights}", *outputs]
    config = _config("precompute", [*words, "annotate.precision=bfloat16"])
    store = Store(config.store.folder)
    plan = plan_pass(resolve_precompute(config, store), store)
    task = ComparePrecision(
        store_path=store.folder,
        teacher=plan.teacher,
        num_classes=plan.num_classes,
        explainer=plan.explainer,
        config=config.annotate,
        num_threads=1,
    )
    sample = select_sample(plan.shards, PRECISION_RECORDS)
    _, agreement = measure_sample(SerialExecutor(), task, sample, plan.shards)
    assert agreement is not None
    return Fidelity(network=name, accuracy=trained.accuracy["test"], agreement=agreement)


def _config(verb: str, words: Sequence[str]) -> Any:
    options = compose(verb, ["store.path=store", *words])
    return with_absolute_paths(build_verb_config(verb, options))


def markdown(measured: Sequence[Fidelity]) -> str:
    """Markdown table with a row per network."""
    lines = [
        "| network | accuracy, % | same largest logit, % | divergence, nats: mean | largest | "
        "cosine of maps: mean | lowest |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in measured:
        each = one.agreement
        maps = [each.cosine_mean.get("map"), each.cosine_lowest.get("map")]
        cells = [
            one.network,
            f"{100 * one.accuracy:.1f}",
            f"{100 * each.top1:.1f}",
            f"{each.kl_mean:.2g}",
            f"{each.kl_largest:.2g}",
            *("float32" if value is None else f"{value:.5f}" for value in maps),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def load() -> list[Fidelity]:
    """Read the recorded agreement."""
    return [
        Fidelity(**values | {"agreement": Agreement(**values["agreement"])})
        for values in json.loads(RESULTS.read_text())
    ]
