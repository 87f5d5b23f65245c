"""Small networks that are trained from nothing on a part of each image, to see what that part tells.

Every subject's masks are evaluated by the same probe, so that only the masks differ. Shape letters: N images, C channels,
H W their size, G 1 or C groups of coordinates that are ranked (a pixel, or each of its channels), K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.evaluators import DiffroarOptions
from pipeline.core.seeds import derive_seed

Part = Literal["top", "bottom"]
BuildProbe = Callable[[int], nn.Module]
"""Number of classes -> a network that has not learned anything."""


@dataclass(frozen=True)
class RankedImages:
    """Images, and how much each of their coordinates matters to somebody."""

    images: Tensor
    """u8 [N, C, H, W]."""
    ranks: Tensor
    """i32 [N, G, H, W]: 0 is what matters most, n - 1 what matters least."""
    labels: Tensor
    """i64 [N]."""

    def select(self, rows: Tensor, part: Part, fraction: float) -> Tensor:
        """The `fraction` of coordinates that matter most, or least: bool [rows, G, H, W]."""
        ranks = self.ranks[rows]
        total = ranks[0].numel()
        count = round(fraction * total)
        return ranks < count if part == "top" else ranks >= total - count


def rank(attributions: Tensor) -> Tensor:
    """Ranks of |attributions| [N, G, H, W] in each image, i32, 0 for the highest; ties in an order drawn once."""
    strength = attributions.abs().flatten(1)
    generator = torch.Generator().manual_seed(derive_seed(0, "ties of ranks"))
    drawn = torch.randperm(strength.shape[1], generator=generator).to(strength.device)
    order = drawn[strength[:, drawn].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(strength.shape[1], dtype=torch.int32, device=strength.device)
    ranks = torch.empty_like(order, dtype=torch.int32)
    return ranks.scatter_(1, order, places.expand_as(ranks)).view_as(attributions)


def keep_part(part: Part, fraction: float, fill: float) -> Callable[[RankedImages, Tensor], Tensor]:
    """Images of which all but that part of the coordinates is `fill`: f32 [rows, C, H, W]."""

    def inputs(ranked: RankedImages, rows: Tensor) -> Tensor:
        kept = ranked.select(rows, part, fraction)
        return torch.where(kept, ranked.images[rows].float() / 255, fill)

    return inputs


def mask_of_part(part: Part, fraction: float) -> Callable[[RankedImages, Tensor], Tensor]:
    """The places of that part alone, as 0 and 1, and nothing of the image: f32 [rows, C, H, W]."""

    def inputs(ranked: RankedImages, rows: Tensor) -> Tensor:
        kept = ranked.select(rows, part, fraction).float()
        return kept.expand(-1, ranked.images.shape[1], -1, -1)

    return inputs


def build_probe(width: int) -> BuildProbe:
    """Three convolutions that halve the image each, and a linear layer on their average."""

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
    """Accuracy on test of a network trained on train, both seen through `inputs`; a function of the seed."""
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
                continue  # a batch norm learns nothing from one record
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
