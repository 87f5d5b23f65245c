"""One optimiser step: forward pass, loss and gradients of a batch under its views."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.core.records import Batch, Guidance, Targets
from pipeline.loading.geometry import view_images
from pipeline.losses.base import DistillationLoss, LossTerms, StudentOutput, weighted_sum
from pipeline.models.output import Inner, ModelOutput
from pipeline.training.state import Training
from pipeline.training.superfeature_targets import add_chimeras, label_chimeras


def train_step(
    training: Training,
    batch: Batch,
    input_size: tuple[int, int],
    clip_norm: float | None,
    agc: float | None = None,
) -> LossTerms:
    """One optimiser step on a batch that lies on the model's device; nothing waits for the device.

    The teacher's maps are warped to the student's own grid, so the forward pass comes first.

    clip_norm, agc  of TrainerConfig: how gradients are clipped, if at all
    """
    training.model.train()
    terms = batch_loss(training, batch, input_size)
    training.optimizer.zero_grad()
    training.scaler.scale(terms.total).backward()  # type: ignore[no-untyped-call]
    training.ranks.average_gradients(training.loss.parameters())
    if clip_norm is not None or agc is not None:
        training.scaler.unscale_(training.optimizer)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(_parameters(training), clip_norm)
    if agc is not None:
        from timm.utils.agc import (
            adaptive_clip_grad,  # Brock et al. 2021; timm takes seconds to import
        )

        adaptive_clip_grad(_parameters(training), agc)  # type: ignore[no-untyped-call]
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.loss.finish_step()
    return terms


def batch_loss(training: Training, batch: Batch, input_size: tuple[int, int]) -> LossTerms:
    """The loss of a batch under its views, with the graph to the student's parameters."""
    loss = training.loss
    images, donors = view_images(batch, input_size), None
    if training.superfeatures is not None and loss.chimera_fraction > 0:
        donors = training.superfeatures.draw(loss.chimera_fraction, images)
        images = training.superfeatures.with_chimeras(images, donors)
    output = _forward(training, images, loss.inner)
    if not loss.needs_targets:
        return _loss_of(loss, StudentOutput(logits=output.logits), None, batch)
    grid = (output.features.shape[-2], output.features.shape[-1])
    needs_maps = loss.needs_maps(training.global_step)
    teachers = training.targets(batch, grid, loss.map_control, with_maps=needs_maps)
    if donors is not None:
        teachers = tuple(add_chimeras(targets, donors) for targets in teachers)
        batch = replace(batch, labels=label_chimeras(batch.labels, len(donors)))
    terms = []
    for targets in teachers:
        maps = None
        if needs_maps:
            assert targets.explained_class is not None
            maps = training.explain(training.model, output, targets.explained_class)
        student = StudentOutput(
            logits=output.logits,
            maps=maps,
            input_size=input_size,
            stages=output.stages,
            class_maps=output.class_maps,
            superfeature_logits=output.superfeature_logits,
            superfeature_hidden=output.superfeature_hidden,
            pooled=output.pooled,
            record_index=batch.record_index,
            view_index=batch.view_index,
        )
        terms.append(_loss_of(loss, student, targets, batch))
    return weighted_sum(terms, training.teacher_weights or [1 / len(terms)] * len(terms))


def _loss_of(
    loss: DistillationLoss, student: StudentOutput, targets: Targets | Guidance | None, batch: Batch
) -> LossTerms:
    """The loss under the batch's labels; of mixtures under those of both records, each by its share.

    Label terms are affine in their target, so this is the loss of the mixed target; a label that is not known is
    left out of either mean. What does not read labels, such as a teacher's word on the mixture, keeps its weight;
    it is computed twice where the loss reads labels, too, from the one forward pass.
    """
    own: LossTerms = loss(student, targets, batch.labels)
    share = None if batch.appearance is None else batch.appearance.mixup_lambda
    if share is None or not loss.needs_labels:
        return own
    partners: LossTerms = loss(student, targets, batch.labels.roll(1, dims=0))
    return weighted_sum([own, partners], [share, 1 - share])


def _forward(training: Training, images: Tensor, inner: Inner) -> ModelOutput:
    """One call of the wrapped model; its logits are float32 whatever the precision."""
    numerics = training.numerics
    if numerics.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    mixed = numerics.precision != torch.float32
    with torch.autocast(images.device.type, dtype=numerics.precision, enabled=mixed):
        output: ModelOutput = training.forward(images, inner)
    return output._replace(logits=output.logits.float()) if mixed else output


def _parameters(training: Training) -> list[nn.Parameter]:
    return [*training.model.parameters(), *training.loss.parameters()]
