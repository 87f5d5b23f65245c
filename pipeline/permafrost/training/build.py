"""State and loader of a training, built from its specification with every check of how data, loss and network fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from permafrost.config.models import ModelConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.batches import Batch, Targets
from permafrost.core.digests import derive_seed
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import TargetRequest, downscale, view_images, view_targets
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import mixes_of_pass
from permafrost.loading.random_views import ViewSchedule, schedule_views
from permafrost.loading.recipes import PixelAugmentSchedule
from permafrost.loading.transfer import move_batch
from permafrost.losses.base import StudentOutput
from permafrost.losses.logit_distances import describe_flat_temperature
from permafrost.models.classifier import NO_INTERMEDIATES, Classifier, trial_copy
from permafrost.models.compute import (
    ComputeSettings,
    fastest_precision,
    require_tf32,
    resolve_device,
)
from permafrost.models.explanations import (
    Explainer,
    Grid,
    attribution_named,
    explainer_named,
    map_grid,
    require_places,
    warn_of_coarse_grid,
)
from permafrost.models.network import Network
from permafrost.models.providers import build_model, freeze
from permafrost.models.record_independence import probe_positions, require_independent_network
from permafrost.store.frames import ShardFrames
from permafrost.training.optim import build_optimizer
from permafrost.training.spec import TrainingSpec
from permafrost.training.state import Training
from permafrost.training.targets import LiveTeacher, TargetSource

logger = logging.getLogger("permafrost.training")

MAX_DOWNSCALE = 1.2
"""Maximum number of frame pixels per view pixel, above which bilinear sampling aliases."""
MAX_UPSCALE = 2
"""Maximum number of view pixels per frame pixel, above which most of the work is on pixels that say nothing new."""
_MEASURED_VIEWS = 256
"""Views that are looked at for the warning of aliasing."""


def build_training(spec: TrainingSpec, distributed: DistributedContext) -> Training:
    """Build the state of a training before its first step.

    Raises:
        ConfigError: If data, loss and network do not fit.
    """
    _check_labels(spec)
    weights = spec.dataset.relative_weights()
    require(
        weights is None or not (spec.augment.mixes or any(map(mixes_of_pass, spec.dataset.passes))),
        "data.weight: the two records of a mixture have different weights; set augment.mix=[], or "
        "replay views that are not mixed",
    )
    device = distributed.device or resolve_device("trainer.device", spec.trainer.device)
    torch.manual_seed(derive_seed(spec.seed, "initialisation"))
    model = build_model(spec.model, spec.data_classes, may_replace_head=True)
    if spec.model.weights is None:
        model.learn_moments(partial(_iter_frames, spec.dataset))
    model = model.to(device)
    trial = trial_copy(model).eval()  # what the first batch initializes is left to the first batch
    require(
        spec.trainer.ema is None or trial is not model,
        f"trainer.ema={spec.trainer.ema} needs a copy of {type(model.network).__name__}, which has tensors or objects "
        "that cannot be copied; detach them, or set trainer.ema=null",
    )
    if (probes := _read_probes(spec, device)) is not None:
        _check_independence(spec, trial, probes)
    live = spec.live_teacher
    targets = view_targets if live is None else _build_live_teacher(spec, live, device)
    if spec.target_source is not None:
        targets = spec.target_source(spec.num_classes, spec.input_size)
    explain = (
        explainer_named(spec.explainer)
        if spec.target_source is None
        else attribution_named(model.explainer)
    )
    needs_maps = spec.loss.needs.maps_in(0)
    student_grid = _check_map_grids(spec, trial, targets, explain) if needs_maps else None
    if probes is not None:
        _warn_of_flat_temperature(spec, targets, probes)
    needs = spec.loss.needs
    if needs.intermediates != NO_INTERMEDIATES or needs.target_fields is not None:
        _build_loss_parameters(spec, trial, targets, device)
    spec.loss.on_train_start(spec.dataset)
    loss = spec.loss.to(device)
    compute_settings = _compute_settings(spec.trainer, spec.model, device)
    return Training(
        model=model,
        loss=loss,
        optimizer=build_optimizer(
            spec.optimizer,
            [*model.parameters(), *loss.parameters()],
            fused=device.type == "cuda" or compute_settings.precision == torch.float16,
        ),
        explain=explain,
        map_grid=student_grid,
        targets=targets,
        sums_teachers=spec.sums_teachers,
        seed=spec.seed,
        compute_settings=compute_settings,
        distributed=distributed,
        weights=None if weights is None else weights.to(device),
        ema=spec.trainer.ema,
        has_labels=spec.dataset.has_labels and bool(spec.class_names),
    )


def build_loader(spec: TrainingSpec, distributed: DistributedContext) -> TrainLoader:
    """Build the loader of a rank's batches."""
    sizes = [spec.input_size]
    if spec.live_teacher is not None:
        sizes.append(_live_size(spec, spec.live_teacher))
    return TrainLoader(
        spec.dataset,
        None if spec.replays else _build_views(spec),
        PixelAugmentSchedule(
            replace(spec.augment, operations=()) if spec.replays else spec.augment, spec.seed
        ),
        view_size=max(sizes),
        batch_size=spec.trainer.batch_size,
        seed=spec.seed,
        loader_processes=spec.trainer.loader_processes,
        views_per_step=spec.views_per_step,
        expand=spec.expand_views,
        sampling=spec.trainer.sampling,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )


def _check_labels(spec: TrainingSpec) -> None:
    """Raise ConfigError unless the loss and the network support the labels of the data."""
    require(
        not spec.loss.needs.labels or spec.dataset.has_labels,
        "the loss needs labels, but none of the records has a label of the network's classes; set method.lambda_ce=0 "
        "or use labeled data",
    )
    many = spec.dataset.has_many_labels
    spec.loss.check_labels(many=many)
    reads_outputs = spec.loss.needs.labels or (spec.loss.needs.targets and spec.loss.needs.logits)
    require(
        many or (spec.model.classes or spec.num_classes) != 1 or not reads_outputs,
        "the network has one output, whose softmax is always 1, so nothing would be learned; for two classes and one "
        "logit z, let the network return [0, z]",
    )
    require(
        not many or spec.model.classes in (None, spec.num_classes),
        f"the network's option classes={spec.model.classes} is not the {spec.num_classes} classes of the "
        "labels; set it to null",
    )


def _read_probes(spec: TrainingSpec, device: torch.device) -> Batch | None:
    """Read a few records for checks before the first step, None if there is only one record."""
    if not (positions := probe_positions(len(spec.dataset))):
        return None
    at = [(position, 0) for position in positions] if spec.replays else positions
    return move_batch(spec.dataset.__getitems__(at), device)


def _check_independence(spec: TrainingSpec, model: Classifier, batch: Batch) -> None:
    """Raise ConfigError if a network's outputs are not the classes, or depend on other records in eval mode."""
    images = view_images(batch, spec.input_size)
    with torch.no_grad():
        logits = model(
            images
        ).logits  # which also initializes what the first batch of a training does
    outputs, needs = spec.model.classes or spec.num_classes, spec.loss.needs
    require(
        logits.shape[1] == outputs or not (needs.labels or (needs.targets and needs.logits)),
        f"{spec.model.label} returns {logits.shape[1]} logits, but its targets are of {outputs} classes; build it with "
        f"{outputs} outputs",
    )
    require_independent_network(model, images)


@torch.no_grad()
def _warn_of_flat_temperature(spec: TrainingSpec, targets: TargetSource, batch: Batch) -> None:
    """Log a warning if the term kd teaches nothing at the temperature of the options."""
    config = getattr(spec.loss, "config", None)
    if (tau := getattr(config, "tau", None)) is None or not getattr(config, "lambda_kd", 0):
        return
    loss = getattr(config, "logits", "softmax")
    for teacher in targets(batch, TargetRequest((1, 1), with_maps=False)):
        logits = teacher.logits
        if logits is not None and (warning := describe_flat_temperature(loss, logits, tau)):
            logger.warning("%s", warning)


def _check_map_grids(
    spec: TrainingSpec, model: Classifier, targets: TargetSource, explain: Explainer
) -> Grid:
    """Return the grid of the student's explanations.

    Raises:
        ConfigError: If they, or those of a teacher, have only one cell.
    """
    student_grid = map_grid(model, spec.input_size, explain)
    require_places(
        student_grid,
        spec.input_size,
        "the student's explanations"
        if spec.target_source is None
        else "the network's explanations",
        "raise augment.size or choose a network with a smaller stride",
    )
    teacher_grids = [
        ((field.shape[-2], field.shape[-1]), spec.dataset.store.size, f"the maps of {teacher.name}")
        for teacher in spec.dataset.passes
        for field in teacher.manifest.fields
        if field.name == "map"
    ]
    if isinstance(targets, LiveTeacher):
        size = targets.input_size
        grid = map_grid(targets.model, size, targets.explain)
        teacher_grids = [(grid, size, "the teacher's explanations")]
    for grid, size, whose in teacher_grids:
        require_places(grid, size, whose, "raise teacher.input_size or choose another teacher")
        warn_of_coarse_grid(student_grid, grid)
    return student_grid


_BATCH = 4096


def _iter_frames(dataset: StoreDataset) -> Iterator[Tensor]:
    """Read the frames or rows of the whole split that a training reads, in parts."""
    (first,) = dataset.store.index.shard_numbers(dataset.rows_at(np.zeros(1, np.int64)))
    split = dataset.store.shards[int(first)].split
    for number in dataset.store.shards.splits[split].tolist():
        shard = dataset.store.shards[number]
        frames = ShardFrames(dataset.store, shard)
        yield from (
            frames.read(start, min(start + _BATCH, shard.records)).frames
            for start in range(0, shard.records, _BATCH)
        )


@torch.no_grad()
def _build_loss_parameters(
    spec: TrainingSpec, model: Classifier, targets: TargetSource, device: torch.device
) -> None:
    """Run both networks on one record so that the loss can create the parameters whose shapes depend on them.

    They are drawn from a separate seed, which is the same on every rank.
    """
    batch = move_batch(spec.dataset.__getitems__([(0, 0) if spec.replays else 0]), device)
    output = model(view_images(batch, spec.input_size), spec.loss.needs.intermediates)
    grid = (output.features.shape[-2], output.features.shape[-1])
    examples = spec.loss.convert_targets(targets(batch, TargetRequest(grid, with_maps=False)))
    torch.manual_seed(derive_seed(spec.seed, "initialisation of the loss"))
    for example in examples:
        if isinstance(example, Targets):
            spec.loss.build(StudentOutput(output=output), example)


def _build_live_teacher(
    spec: TrainingSpec, config: ModelConfig, device: torch.device
) -> LiveTeacher:
    reads_head = spec.loss.needs.reads_head
    classes = spec.data_classes if reads_head else spec.num_classes
    return LiveTeacher(
        config.name,
        freeze(build_model(config, classes, may_replace_head=not reads_head)).to(device),
        explainer_named(spec.live_explainer.line),
        _live_size(spec, config),
        replace(_compute_settings(spec.trainer, config, device), compile=False),
        spec.live_explainer,
        spec.loss.needs,
    )


def _live_size(spec: TrainingSpec, config: ModelConfig) -> tuple[int, int]:
    """Return the (height, width) of a live teacher's inputs, that of a pass of the same views."""
    side = Network(config, spec.num_classes).input_size
    return spec.input_size if side is None else (side, side)


def _compute_settings(
    trainer: TrainerOptions, network: ModelConfig, device: torch.device
) -> ComputeSettings:
    """Return the settings of a network's forward passes on a device."""
    precision = fastest_precision(device) if trainer.precision == "auto" else trainer.precision
    if precision == "tf32":
        require_tf32("trainer.precision", device)
    return ComputeSettings(
        compile=trainer.compile,
        channels_last=network.suits_channels_last
        if trainer.channels_last is None
        else trainer.channels_last,
    ).with_precision(precision)


def _build_views(spec: TrainingSpec) -> ViewSchedule:
    if (views := schedule_views(spec.dataset, spec.augment, spec.seed)).whole_pixels:
        return views
    first = spec.dataset.sizes(range(min(_MEASURED_VIEWS, len(spec.dataset))))
    if (worst := worst_downscale(views, spec.input_size, first)) > MAX_DOWNSCALE:
        logger.warning(
            "views downscale the canonical frame of %dx%d by a factor of up to %.1f and alias above %.1f; "
            "pack the store with a smaller frame, or raise augment.size",
            *views.size,
            worst,
            MAX_DOWNSCALE,
        )
    if min(spec.input_size) > MAX_UPSCALE * max(views.size):
        logger.warning(
            "augment.size=%d enlarges frames of %dx%d by a factor of %.1f, and a step costs about %.0f times as much; "
            "leave augment.size at null, unless the network needs images of that size",
            spec.input_size[0],
            *views.size,
            min(spec.input_size) / max(views.size),
            (min(spec.input_size) / max(views.size)) ** 2,
        )
    return views


def worst_downscale(views: ViewSchedule, input_size: tuple[int, int], sizes: Tensor) -> float:
    """Compute the largest number of canonical pixels per pixel of a view, over one view per record.

    Args:
        views: Schedule; the first views of epoch 0 are drawn.
        input_size: (height, width) of a view.
        sizes: (height, width) of the originals, [n, 2].
    """
    drawn = views.views(0, 0, sizes)
    matrices = torch.eye(3)[None] if drawn is None else drawn.canonical_from_view
    return float(downscale(matrices, views.size, input_size).max())
