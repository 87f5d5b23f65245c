"""The teacher in the loop (`mode=live`): the reference that frozen targets are measured against.

It sees the very view that the student sees, and explains its top-1 class there ("consistent teaching",
Beyer et al. 2022; e2KD, Table 3). It costs a forward pass of the teacher in every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.explainers import forward_to_explain
from pipeline.geometry import place_on_grid, view_images
from pipeline.models.output import NOTHING
from pipeline.payloads.inner import EXTRAS
from pipeline.records import Targets

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.explainers import Explainer
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import ModelOutput
    from pipeline.records import Batch


class LiveTeacher:
    """Targets of a batch's own views; takes the place of `geometry.view_targets`."""

    def __init__(
        self,
        name: str,
        model: Classifier,
        explain: Explainer,
        input_size: tuple[int, int],
        precision: torch.dtype = torch.float32,
        extra: str | None = None,
    ) -> None:
        """model       frozen, on the training device
        input_size  (height, width) at which the teacher sees the view; fetched from the canonical
                    frame at once, never by way of the student's pixels
        precision   of its forward pass; explanations are float32 at least
        extra       whose fields of `Targets.extra` the loss reads
        """
        self.name = name
        self.model = model
        self.explain = explain
        self.input_size = input_size
        self.precision = precision
        self.extra = None if extra is None else EXTRAS[extra]

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Targets, ...]:
        """One Targets, its maps [B, 1, A, h, w] on the student's (h, w) `grid`.

        map_control  "shuffled" gives each record the map of its neighbour in the batch
        """
        images = view_images(batch, self.input_size)
        output = self._forward(images, with_maps=with_maps)
        logits = output.logits.detach().float()
        top1 = logits.argmax(dim=1, keepdim=True)  # [B, E = 1]
        extra = {} if self.extra is None else self.extra.fields(output)
        if not with_maps:
            return (Targets(teacher=self.name, logits=logits, explained_class=top1, extra=extra),)
        maps = place_on_grid(self.explain(self.model, output, top1), grid)
        if map_control == "shuffled":
            maps = maps.roll(1, dims=0)
        valid = maps.flatten(2).any(dim=2)
        return (
            Targets(
                teacher=self.name,
                logits=logits,
                explained_class=top1,
                maps=maps,
                map_valid=valid,
                extra=extra,
            ),
        )

    def _forward(self, images: Tensor, *, with_maps: bool) -> ModelOutput:
        inner = NOTHING if self.extra is None else self.extra.inner
        if self.precision == torch.float32 and with_maps:
            return forward_to_explain(self.model, images, inner)
        mixed = (
            self.precision != torch.float32
        )  # maps are then computed in float32 from the features
        with torch.autocast(images.device.type, dtype=self.precision, enabled=mixed):
            return self.model(images, inner)
