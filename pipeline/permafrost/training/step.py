"""One optimizer step: forward pass, loss and gradients of a batch under its views.

Not here: accumulation of gradients over several batches, and more than one optimizer.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from permafrost.core.batches import Batch, ExplainedTargets, MixedLabels, Targets, require_maps
from permafrost.core.digests import derive_seed
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.core.generators import kept_generators
from permafrost.core.records import NO_LABEL
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import TargetRequest, view_images
from permafrost.loading.mixtures import mix_targets
from permafrost.loading.transfer import iter_on_device
from permafrost.losses.base import LossTerms, StepInputs, StudentOutput
from permafrost.models.classifier import ModelOutput, eval_mode
from permafrost.models.compute import float32_products
from permafrost.training.state import Training, seed_generators


def train_step(
    training: Training,
    batch: Batch,
    input_size: tuple[int, int],
    clip_norm: float | None,
    agc: float | None = None,
) -> LossTerms:
    """Run one optimizer step on a batch on the model's device, without synchronizing with the device.

    The teacher's maps are warped to the student's grid, so the forward pass of the student comes first.

    Args:
        training: State, whose network, loss, optimizer and scaler are updated.
        batch: Batch under its views, on the model's device.
        input_size: (height, width) of the student's input.
        clip_norm: Maximum norm of the gradients of all parameters, None to disable clipping.
        agc: Factor of adaptive gradient clipping (Brock et al. 2021), None to disable it.

    Returns:
        The loss of the step, before the update.
    """
    training.model.train()
    with float32_products(tf32=training.compute_settings.tf32):
        terms = batch_loss(training, batch, input_size)
        training.optimizer.zero_grad()
        training.scaler.scale(terms.total).backward()  # type: ignore[no-untyped-call]
    training.distributed.average_gradients(training.loss.parameters())
    if clip_norm is not None or agc is not None:
        training.scaler.unscale_(training.optimizer)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(_parameters(training), clip_norm)
    if agc is not None:
        clip_by_unit(_parameters(training), agc)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.loss.on_step_end()
    training.update_average()
    return terms


def terms_of_split(
    training: Training, dataset: StoreDataset, batch_size: int, input_size: tuple[int, int]
) -> dict[str, float]:
    """Compute the terms of the loss on other records in the evaluation view, and leave the training as it was.

    Args:
        training: State after an epoch.
        dataset: Records with the passes and outputs that the loss reads.
        batch_size: Records per batch; a term is a mean over batches, weighted by their records.
        input_size: (height, width) of the student's input.

    Returns:
        Unweighted terms by name, and `total`.
    """
    alone = DistributedContext()  # as the first rank evaluates
    evaluated, loss = copy.copy(training), training.loss
    evaluated.model = evaluated.forward = training.network
    evaluated.distributed, evaluated.weights, evaluated.global_step = alone, None, 0
    sums: dict[str, float] = defaultdict(float)
    loss.distributed = alone
    with eval_mode(training.network), eval_mode(loss), kept_generators():
        batches = iter_on_device(iter_batches(dataset, batch_size), training.model.device)
        for number, batch in enumerate(batches):
            seed_generators(derive_seed(training.seed, "terms", number), training.model.device)
            terms = batch_loss(evaluated, batch, input_size)
            for name, value in {**terms.terms, "total": terms.total}.items():
                sums[name] += len(batch.keys) * float(value.detach())
    loss.distributed = training.distributed
    return {name: value / len(dataset) for name, value in sums.items()}


def batch_loss(training: Training, batch: Batch, input_size: tuple[int, int]) -> LossTerms:
    """Compute the loss of a batch under its views, with the graph to the student's parameters.

    Args:
        training: State of the training.
        batch: Batch under its views, on the model's device.
        input_size: (height, width) of the student's input.
    """
    # 1. The images in their views, and the labels that belong to them.
    images = view_images(batch, input_size)
    batch = replace(batch, rendered=images)
    inputs = training.prepare(batch, images)
    # 2. The student.
    student = run_student(training, batch, inputs.images, input_size)
    # 3. Each teacher's targets on the student's grid, and its maps of the classes that they explain.
    needs, features = training.loss.needs, student.output.features
    request = TargetRequest(
        training.map_grid or (features.shape[-2], features.shape[-1]),
        needs.map_control,
        with_maps=needs.maps_in(training.global_step),
        scaled=needs.scaled_maps,
    )
    teachers = training.read_targets(batch, request)
    pairs = [
        explain_targets(training, student, inputs.change_targets(targets)) for targets in teachers
    ]
    if training.weights is not None:
        pairs = [
            (weigh_records(output, training.weights[batch.record_index]), targets)
            for output, targets in pairs
        ]
    # 4. The loss with each teacher.
    terms = [training.loss(output, targets, inputs.labels) for output, targets in pairs]
    total = training.loss.combine(terms, 1.0 if training.sums_teachers else 1 / len(terms))
    accuracy = _training_accuracy(training, student.output, inputs)
    return replace(total, statistics=total.statistics | accuracy)


def run_student(
    training: Training, batch: Batch, images: Tensor, input_size: tuple[int, int]
) -> StudentOutput:
    """Run the wrapped model in the configured precision and memory format, with float32 logits."""
    settings = training.compute_settings
    output = settings.run(training.forward, images, training.loss.needs.intermediates)
    return StudentOutput(
        output=output._replace(logits=output.logits.float()) if settings.is_mixed else output,
        input_size=input_size,
        record_index=batch.record_index,
        view_index=batch.view_index,
    )


def weigh_records(student: StudentOutput, weights: Tensor) -> StudentOutput:
    """Return the same outputs, whose gradients are multiplied by the weight w_b of their record b.

    For a loss that is a mean over records, L = sum_b l_b / B, the gradient of the network is that of
    sum_b w_b l_b / B, whatever the loss computes. In a loss of relations between records (RKD), each record's part of
    the gradient is weighted by its own w_b. Values of the loss, and gradients of its own parameters, are not weighted.

    Args:
        student: Outputs, with the maps, of which the explanation has no weights.
        weights: Weight of each record, f32 [B].
    """

    def weigh(values: Any) -> Any:
        if isinstance(values, Tensor) and values.requires_grad:
            values = values.view_as(values)  # so that its hook is not that of the explanation
            values.register_hook(
                lambda gradient: (
                    gradient * weights.to(gradient).view(-1, *[1] * (gradient.dim() - 1))
                )
            )
        return values

    return replace(student, output=tree_map(weigh, student.output), maps=weigh(student.maps))


def explain_targets(
    training: Training, student: StudentOutput, targets: Targets
) -> tuple[StudentOutput, Targets]:
    """Return the student with maps of the classes that these targets explain, if the loss reads them in this step."""
    readers = training.loss.needs_of(targets.teacher)
    needs = next((needs for needs in readers if needs.maps_in(training.global_step)), None)
    if needs is None:
        return student, mix_targets(targets)
    if needs.max_classes is not None:
        targets = require_maps(targets).first_classes(needs.max_classes)
    targets = mix_targets(targets, second_maps=needs.second_maps)
    explained = targets if isinstance(targets, ExplainedTargets) else require_maps(targets)
    maps = training.explain(training.model, student.output, explained.target_class)
    require(
        maps.requires_grad,
        "the student's maps have no gradient to its parameters, so it cannot learn from the teacher's; name an "
        "explainer that torch differentiates with method.explainer=, such as gradcam",
    )
    return replace(student, maps=maps), targets


def _training_accuracy(
    training: Training, output: ModelOutput, inputs: StepInputs
) -> dict[str, Tensor]:
    """Compute the fraction of the batch's labeled records that are classified correctly; empty if it has no meaning.

    Mixed images, images made of parts of several records, and records with many labels have none.
    """
    labels = inputs.labels
    if (
        not training.has_labels
        or isinstance(labels, MixedLabels)
        or inputs.on_targets
        or labels.dim() > 1
    ):
        return {}
    known = labels != NO_LABEL
    right = (output.logits.detach().argmax(dim=1) == labels) & known
    return {"training_accuracy": right.sum() / known.sum().clamp(min=1)}


_LEAST_NORM = 1e-3
"""Norm that a unit has at least, so that one that starts at 0 can move (Brock et al. 2021, section 4.1)."""


@torch.no_grad()
def clip_by_unit(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """Scale the gradient of each unit to at most `factor` times the norm of its weights, in place (AGC).

    A unit is a row of a parameter of two axes or more, and otherwise the whole parameter (Brock et al. 2021, equation
    3).

    Args:
        parameters: Parameters, of which those without a gradient stay as they are.
        factor: Largest norm of a gradient relative to its weights, lambda in the paper.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            largest = _unit_norms(parameter).clamp(min=_LEAST_NORM) * factor
            norms = _unit_norms(parameter.grad)
            scaled = parameter.grad * (largest / norms.clamp(min=1e-6))
            parameter.grad.copy_(torch.where(norms < largest, parameter.grad, scaled))


def _unit_norms(values: Tensor) -> Tensor:
    """Euclidean norm of each unit, of a shape that is broadcast over its values."""
    axes = tuple(range(1, values.ndim)) or None
    norms: Tensor = torch.linalg.vector_norm(values, dim=axes, keepdim=axes is not None)
    return norms


def _parameters(training: Training) -> list[nn.Parameter]:
    return [*training.model.parameters(), *training.loss.parameters()]
