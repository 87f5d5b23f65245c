"""The teacher in the loop (`mode=live`), the reference for frozen targets.

It receives the same view as the student and explains its classes there, by default the predicted class ("consistent
teaching", Beyer et al. 2022; e2KD, Table 3). The cost is one forward pass of the teacher in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.core.records import Batch, Targets
from permafrost.loading.geometry import neighbor_maps, place_on_grid, view_images
from permafrost.losses.base import Needs
from permafrost.models.classifier import Classifier
from permafrost.models.explainers.classes import explained_classes
from permafrost.models.explainers.explain import Explainer, forward_to_explain, needs_graph
from permafrost.models.output import ModelOutput


class LiveTeacher:
    """Target source that runs the teacher on the views of the batch, used instead of `geometry.view_targets`."""

    def __init__(
        self,
        name: str,
        model: Classifier,
        explain: Explainer,
        input_size: tuple[int, int],
        precision: torch.dtype = torch.float32,
        explainer: ExplainerConfig = GradCamConfig(),  # noqa: B008, frozen
        needs: Needs = Needs(),  # noqa: B008, frozen
    ) -> None:
        """Configure the teacher.

        model       frozen network on the training device
        input_size  (height, width) of the teacher's view, sampled directly from the canonical frame instead of from the
                    student's pixels
        precision   of the forward pass; explanations are computed in float32 or higher, and if that takes a pass of the
                    whole network (B-cos), logits are taken from the same pass
        explainer   options that select the explained classes, as returned by `resolve_explainer`
        needs       needs of the loss, which select the intermediates
        """
        self.name = name
        self.model = model
        self.explain = explain
        self.input_size = input_size
        self.precision = precision
        self.explainer = explainer
        self.needs = needs

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Targets, ...]:
        """Compute one Targets with maps [B, E, A, h, w] on the student's (h, w) `grid`.

        map_control  "shuffled" assigns to each record the map of its neighbor in the batch
        """
        images = view_images(batch, self.input_size)
        output = self._forward(images, with_maps=with_maps)
        logits = output.logits.detach().float()
        classes = explained_classes(self.explainer, logits, batch.labels, batch.keys)
        fields = self.needs.target_fields
        intermediates = {} if fields is None else fields(output)
        if not with_maps:
            return (
                Targets(
                    teacher=self.name,
                    logits=logits,
                    explained_class=classes,
                    intermediates=intermediates,
                ),
            )
        maps = place_on_grid(self.explain(self.model, output, classes), grid)
        if map_control == "shuffled":
            maps = neighbor_maps(maps, classes)
        valid = maps.flatten(2).any(dim=2) & (classes >= 0)
        return (
            Targets(
                teacher=self.name,
                logits=logits,
                explained_class=classes,
                maps=maps,
                map_valid=valid,
                intermediates=intermediates,
            ),
        )

    def _forward(self, images: Tensor, *, with_maps: bool) -> ModelOutput:
        intermediates = self.needs.intermediates
        if with_maps and (self.precision == torch.float32 or needs_graph(self.model)):
            return forward_to_explain(self.model, images, intermediates)
        # Maps are then computed in float32 from the features.
        mixed = self.precision != torch.float32
        with torch.autocast(images.device.type, dtype=self.precision, enabled=mixed):
            return self.model(images, intermediates)
