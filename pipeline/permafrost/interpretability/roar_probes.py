"""Small networks trained from scratch on a part of each image, to measure the information in that part.

All evaluated models use the same probe, so only their masks differ. Shape letters: N images, C channels, H W their
size, G 1 or C groups of ranked coordinates (a pixel, or each of its channels), K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.core.seeds import derive_seed
from permafrost.interpretability.options import DiffroarOptions

Part = Literal["top", "bottom"]
_LEVELS = 256
BuildProbe = Callable[[int], nn.Module]
"""Function from the number of classes to an untrained network."""


@dataclass(frozen=True)
class RankedImages:
    """Images with the rank of each coordinate by attribution."""

    images: Tensor
    """Images u8 [N, C, H, W]."""
    quantiles: Tensor
    """Rank quantiles u8 [N, G, H, W] of `rank_quantiles`, which need a quarter of the memory of ranks."""
    labels: Tensor
    """Labels i64 [N]."""

    def select(self, rows: Tensor, part: Part, fraction: float) -> Tensor:
        """Select the `fraction` of most ("top") or least ("bottom") important coordinates: bool [rows, G, H, W].

        It is rounded to a multiple of 1 / 256 for more than 256 coordinates, so by up to 0.2 % of them.
        """
        quantiles = self.quantiles[rows].short()  # u8 could not be compared with 256
        levels = min(quantiles[0].numel(), _LEVELS)
        count = round(fraction * levels)
        return quantiles < count if part == "top" else quantiles >= levels - count


def rank(attributions: Tensor) -> Tensor:
    """Rank |attributions| [N, G, H, W] within each image, i32, 0 for the highest. Ties follow a fixed random order."""
    strength = attributions.abs().flatten(1)
    generator = torch.Generator().manual_seed(derive_seed(0, "ties of ranks"))
    drawn = torch.randperm(strength.shape[1], generator=generator).to(strength.device)
    order = drawn[strength[:, drawn].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(strength.shape[1], dtype=torch.int32, device=strength.device)
    ranks = torch.empty_like(order, dtype=torch.int32)
    return ranks.scatter_(1, order, places.expand_as(ranks)).view_as(attributions)


def rank_quantiles(attributions: Tensor) -> Tensor:
    """Quantiles u8 of the ranks of |attributions| [N, G, H, W] within each image, 0 for the highest.

    For up to 256 coordinates these are the ranks themselves.
    """
    ranks = rank(attributions)
    total = ranks[0].numel()
    if total > _LEVELS:
        ranks = ranks.long() * _LEVELS // total
    return ranks.to(torch.uint8)


def keep_part(part: Part, fraction: float, fill: float) -> Callable[[RankedImages, Tensor], Tensor]:
    """Build a function to images in which all other coordinates are set to `fill`: f32 [rows, C, H, W]."""

    def inputs(ranked: RankedImages, rows: Tensor) -> Tensor:
        kept = ranked.select(rows, part, fraction)
        return torch.where(kept, ranked.images[rows].float() / 255, fill)

    return inputs


def mask_of_part(part: Part, fraction: float) -> Callable[[RankedImages, Tensor], Tensor]:
    """Build a function to the positions of that part as 0 and 1, without the image: f32 [rows, C, H, W]."""

    def inputs(ranked: RankedImages, rows: Tensor) -> Tensor:
        kept = ranked.select(rows, part, fraction).float()
        return kept.expand(-1, ranked.images.shape[1], -1, -1)

    return inputs


def build_probe(width: int) -> BuildProbe:
    """Three convolutions that each halve the image, and a linear layer on their spatial average."""

    def build(classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        channels = 3
        for factor in (1, 2, 4):
            layers += [
                nn.Conv2d(channels, factor * width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        return nn.Sequential(*layers, *head)

    return build


def predictive_power(
    train: RankedImages,
    test: RankedImages,
    inputs: Callable[[RankedImages, Tensor], Tensor],
    build: BuildProbe,
    options: DiffroarOptions,
    *,
    seed: int,
    classes: int,
) -> float:
    """Accuracy on `test` of a probe trained on `train`, both transformed by `inputs`. Deterministic for a seed."""
    device = train.images.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, "probe"))
        probe = build(classes).to(device).train()
    optimizer = torch.optim.Adam(probe.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order of the probe"))
    for epoch in range(options.epochs):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - epoch / options.epochs)
        order = torch.randperm(len(train.labels), generator=generator).to(device)
        for rows in _cut(order, options.batch_size):
            if len(rows) < 2:
                continue  # batch norm cannot train on one record
            with torch.enable_grad():
                loss = F.cross_entropy(probe(inputs(train, rows)), train.labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    probe.eval()
    right = 0
    with torch.no_grad():
        for rows in _cut(torch.arange(len(test.labels), device=device), options.batch_size):
            answers = probe(inputs(test, rows)).argmax(dim=1)
            right += int((answers == test.labels[rows]).sum())
    return right / len(test.labels)


def _cut(rows: Tensor, size: int) -> list[Tensor]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
