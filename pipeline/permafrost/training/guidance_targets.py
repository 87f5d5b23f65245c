"""Targets of a guided teacher: one class per record, drawn uniformly, and the regions of that class."""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.core.labels import multi_hot
from permafrost.core.records import NO_CLASS, Batch, Guidance
from permafrost.loading.regions import RegionKind, regions_of
from permafrost.loading.transfer import copy_to


class GuidanceSource:
    """Target source with one uniformly drawn class per record and its regions, used instead of `view_targets`."""

    def __init__(self, kind: RegionKind, num_classes: int, input_size: tuple[int, int]) -> None:
        """Configure the source.

        input_size  (height, width) of the network's view
        """
        self.kind = kind
        self.num_classes = num_classes
        self.input_size = input_size

    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Guidance, ...]:
        """Draw one Guidance with torch's global generator of the host, where boxes are."""
        classes = _draw(multi_hot(batch.labels_on_host, self.num_classes))
        regions = regions_of(batch, classes, self.kind, self.input_size)
        explained = copy_to(classes[:, None], batch.inputs.device)
        return (Guidance(explained_class=explained, regions=regions),)


def _draw(hot: Tensor) -> Tensor:
    """Draw one of each record's classes uniformly: i64 [n], NO_CLASS if it has none."""
    known = hot.any(dim=1)
    drawn = torch.multinomial(torch.where(known[:, None], hot, 1.0), 1)[:, 0]
    return torch.where(known, drawn, NO_CLASS)
