"""Targets of a training that are not read from a pass: those of a live teacher.

A live teacher (`mode=live`), the reference for frozen targets, receives the same view as the student and explains its
classes there, by default the predicted class ("consistent teaching", Beyer et al. 2022; e2KD, Table 3). The cost is one
forward pass of the teacher in every step.

Not here: teachers that learn along with the student. A teacher is frozen while a student trains.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from permafrost.annotation.teacher_fields import fields_of_outputs
from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.core.batches import Batch, MapTargets, Targets
from permafrost.loading.geometry import (
    TargetRequest,
    neighbor_features,
    neighbor_maps,
    place_on_grid,
    view_images,
)
from permafrost.loading.pixel_changes import blank_maps
from permafrost.losses.base import Needs
from permafrost.models.classifier import Classifier, ModelOutput
from permafrost.models.compute import ComputeSettings
from permafrost.models.explanations import Explainer, forward_to_explain, target_classes


class TargetSource(Protocol):
    """Source of the teachers' targets for a batch under its views, stored or computed live."""

    def __call__(self, batch: Batch, request: TargetRequest) -> tuple[Targets, ...]:
        """Return one set of targets per teacher.

        Args:
            batch: Batch under its views, on the training device.
            request: Grid and perturbation of the maps.
        """


# ---- live targets ----------------------------------------------------------------------------------


class LiveTeacher:
    """Target source that runs the teacher on the views of the batch, used instead of `geometry.view_targets`."""

    def __init__(
        self,
        name: str,
        model: Classifier,
        explain: Explainer,
        input_size: tuple[int, int],
        compute_settings: ComputeSettings = ComputeSettings(),  # noqa: B008, frozen
        explainer: ExplainerConfig = GradCamConfig(),  # noqa: B008, frozen
        needs: Needs = Needs(),  # noqa: B008, frozen
    ) -> None:
        """Configure the teacher.

        Args:
            name: Name of the teacher among those of a student.
            model: Frozen network on the training device.
            explain: Explainer of the maps.
            input_size: (height, width) of the teacher's view, sampled directly from the canonical frame instead of from
                the student's pixels.
            compute_settings: Settings of the forward pass; explanations are computed in float32 or higher, and if that
                takes a pass of the whole network (B-cos), logits are taken from the same pass.
            explainer: Options that select the target classes, as returned by `resolve_explainer`.
            needs: Needs of the loss, which select the intermediates.
        """
        self.name, self.model = name, model
        compute_settings.set_memory_format(model)
        self.explain, self.input_size, self.compute_settings = explain, input_size, compute_settings
        self.explainer, self.needs = explainer, needs

    @torch.no_grad()
    def __call__(self, batch: Batch, request: TargetRequest) -> tuple[Targets, ...]:
        """Compute the teacher's targets for the batch, with maps [B, E, A, h, w] on the requested grid."""
        output = self._forward(view_images(batch, self.input_size), with_maps=request.with_maps)
        logits = output.logits.detach().float()
        classes = target_classes(self.explainer, logits, batch.labels, batch.keys)
        fields = self.needs.target_fields or partial(fields_of_outputs, self.needs.outputs)
        intermediates = fields(output)
        if request.map_control == "shuffled":
            intermediates = neighbor_features(intermediates)
        targets = Targets(teacher=self.name, logits=logits, intermediates=intermediates)
        if not request.with_maps:
            return (targets,)
        maps = place_on_grid(self.explain(self.model, output, classes), request.grid)
        maps = blank_maps(maps, batch.pixel_augment)
        if request.map_control == "shuffled":
            maps = neighbor_maps(maps, classes)
        return (MapTargets.of(targets, classes, maps),)

    def _forward(self, images: Tensor, *, with_maps: bool) -> ModelOutput:
        intermediates = self.needs.intermediates
        if with_maps:
            return forward_to_explain(self.model, images, intermediates, self.compute_settings)
        return self.compute_settings.run(self.model, images, intermediates)
