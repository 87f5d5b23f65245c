"""Forward passes of six networks in float32 and bfloat16, in both memory formats, and compiled.

    python -m tests.benchmarks precision           (about ten minutes; only if it is named)

All settings of a network alternate, in one thread. Numbers are milliseconds per image, and are printed with what the
processor has, because they are those of one kind of processor only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from permafrost.config.models import (
    CifarModelConfig,
    ModelConfig,
    TorchvisionModelConfig,
)
from permafrost.models.compute import ComputeSettings, fastest_precision
from permafrost.models.providers import build_model, freeze
from permafrost_papers.bcos.options import BcosModelConfig
from permafrost_timm.options import TimmModelConfig
from tests.benchmarks.figures import in_rounds

RESULTS = Path(__file__).with_name("precision_times.json")
ROUNDS = 5
CLASSES = 1000
NETWORKS: dict[str, tuple[ModelConfig, int, int]] = {
    "ResNet-50": (TorchvisionModelConfig(name="resnet50"), 224, 4),
    "DenseNet-121": (TorchvisionModelConfig(name="densenet121"), 224, 4),
    "ConvNeXt-T": (TorchvisionModelConfig(name="convnext_tiny"), 224, 4),
    "ViT-S/16": (TimmModelConfig(name="vit_small_patch16_224"), 224, 4),
    "ResNet-56 of CIFAR": (CifarModelConfig(name="resnet56"), 32, 64),
    "B-cos ResNet-20": (BcosModelConfig(name="resnet20"), 32, 64),
}
"""Networks with the side of their images in pixels and the batch."""
SETTINGS = {
    "float32": ComputeSettings(),
    "float32, channels-last": ComputeSettings(channels_last=True),
    "bfloat16": ComputeSettings(precision=torch.bfloat16),
    "bfloat16, channels-last": ComputeSettings(precision=torch.bfloat16, channels_last=True),
    "float32, channels-last, compiled": ComputeSettings(channels_last=True, compile=True),
    "bfloat16, channels-last, compiled": ComputeSettings(
        precision=torch.bfloat16, channels_last=True, compile=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class ForwardTimes:
    """Milliseconds per image of one network in each setting."""

    network: str
    processor: str
    fastest: str
    """Precision that annotate.precision=auto takes on this processor before it compares values."""
    milliseconds: dict[str, float]
    compile_seconds: dict[str, float]
    """Seconds of the first pass in each setting that is compiled, with empty caches of the compiler."""


def measure(words: Sequence[str]) -> list[ForwardTimes]:
    """Measure all networks."""
    from torch._inductor.utils import fresh_cache  # a second, and docs.tables imports this module

    torch.set_num_threads(1)
    with fresh_cache():
        return [_measure(name, *network) for name, network in NETWORKS.items()]


@torch.no_grad()
def _measure(name: str, config: ModelConfig, side: int, batch: int) -> ForwardTimes:
    torch._dynamo.reset()  # which compiles a function for a few networks only
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    passes: dict[str, Callable[[], object]] = {}
    compile_seconds: dict[str, float] = {}
    for setting, compute in SETTINGS.items():
        torch.manual_seed(0)
        network = freeze(build_model(config, CLASSES))
        compute.set_memory_format(network)

        def run(compute: ComputeSettings = compute, network: torch.nn.Module = network) -> object:
            return compute.run(network, images)

        passes[setting] = run
        if compute.compile:
            network.compile()
            start = perf_counter()
            run()
            compile_seconds[setting] = perf_counter() - start
    times = in_rounds(passes, ROUNDS)
    return ForwardTimes(
        network=name,
        processor=describe_processor(),
        fastest=fastest_precision(torch.device("cpu")),
        milliseconds={setting: median(values) / batch * 1e3 for setting, values in times.items()},
        compile_seconds=compile_seconds,
    )


def describe_processor() -> str:
    """Name the processor and what it has for bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    has = [
        name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)
    ]
    return f"{capabilities.get('cpu_name', 'CPU')} with {', '.join(has) or 'neither AVX nor AMX'}"


def markdown(times: Sequence[ForwardTimes]) -> str:
    """Markdown table with a row per network."""
    settings = list(times[0].milliseconds)
    lines = [
        f"| ms per image, {times[0].processor} | {' | '.join(settings)} | seconds of compilation |",
        "|---" * (len(settings) + 2) + "|",
    ]
    for one in times:
        first = one.milliseconds[settings[0]]
        cells = [
            f"{value:.3g} ({first / value:.2f}x)" if setting != settings[0] else f"{value:.3g}"
            for setting, value in one.milliseconds.items()
        ]
        compilation = " and ".join(f"{value:.0f}" for value in one.compile_seconds.values())
        lines.append(f"| {one.network} | {' | '.join(cells)} | {compilation} |")
    return "\n".join(lines) + "\n"


def load() -> list[ForwardTimes]:
    """Read the recorded times."""
    return [ForwardTimes(**values) for values in json.loads(RESULTS.read_text())]
