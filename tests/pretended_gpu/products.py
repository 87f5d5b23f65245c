"""Errors of TF32, torch's default on a GPU, in numbers that subtract gradients, and of float32, which is not TF32 here.

python -m tests.pretended_gpu.products
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from tests.pretended_gpu import device

device.install()

from permafrost.config.models import CifarModelConfig  # noqa: E402
from permafrost.models import compute  # noqa: E402
from permafrost.models.compute import ComputeSettings  # noqa: E402
from permafrost.models.providers import build_model, freeze  # noqa: E402
from permafrost_papers.ked import dependency  # noqa: E402
from permafrost_papers.ked.curvature import feature_scales, pixel_probes  # noqa: E402
from permafrost_papers.ked.dependency import measure_dependency, symmetric  # noqa: E402
from permafrost_papers.ked.grouping import group_features  # noqa: E402

GRID = (8, 8)


@contextmanager
def torch_default() -> Iterator[None]:
    """Leave the precision of products to torch, as before it was settled."""

    @contextmanager
    def unsettled(*_: Any, **__: Any) -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "float32_products", unsettled)
        patch.setattr(dependency, "exact_float32", unsettled)
        yield


def error_of(value: Tensor, expected: Tensor) -> float:
    """Return the median error relative to the median value."""
    difference = (value.detach().cpu().double() - expected.double()).abs()
    return float(difference.median() / expected.double().abs().median())


def compare(model: torch.nn.Module, images: Tensor, records: int) -> dict[str, Any]:
    """Compare logits and dependencies on the device with those of float64 on the host."""
    exact = freeze(model).double()
    expected = exact(images.double()).logits
    keys = [f"record {number}" for number in range(records)]
    probes = pixel_probes((images.shape[-2], images.shape[-1]), GRID)
    probes = probes.scale_amplitudes(feature_scales([images], probes))

    def measure(network: torch.nn.Module, inputs: Tensor) -> Tensor:
        sums = measure_dependency(
            lambda values: network(values).logits, [(keys, inputs)], probes, modules=network
        )
        return symmetric(sums.matrix)

    matrix = measure(exact, images[:records].double())
    model = exact.float().to("cuda")
    inputs = images.to("cuda")
    results: dict[str, Any] = {}
    settings = ComputeSettings()
    with torch.no_grad():
        for name in ("float32", "tf32"):
            logits = settings.with_precision(name).run(lambda x, _: model(x), inputs).logits
            results[f"logits.{name}"] = error_of(logits, expected)
        with torch_default():
            logits = settings.run(lambda x, _: model(x), inputs).logits
            results["logits.torch_default"] = error_of(logits, expected)
    for name in ("float32", "torch_default"):
        with torch_default() if name != "float32" else pytest.MonkeyPatch.context():
            here = measure(model, inputs[:records])
        results[f"dependency.{name}"] = error_of(here, matrix)
        for number in (4, 8, 16):
            groups = [
                group_features(values.cpu(), number, grid=GRID).partition.assignment(number).numpy()
                for values in (matrix, here)
            ]
            results[f"partition{number}.{name}"] = float(adjusted_rand_score(*groups))
    return results


def main() -> None:
    """Print the comparison for a small network of random weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = build_model(CifarModelConfig(name="resnet8", width=8, weights="random"), 10)
    print(json.dumps(compare(network, torch.rand(16, 3, 16, 16), 2), indent=1), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
