"""A whole training, from its specification to the exported network, as shared by teach and distill.

The same code runs in the process of the stage and in each rank of a cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config.augment import AugmentOptions
from pipeline.config.explainers import ExplainerConfig, GradCamConfig
from pipeline.config.models import ModelConfig
from pipeline.config.runs import save_cost
from pipeline.config.training import OptimizerOptions, TrainerOptions
from pipeline.core.distributed import DistributedContext
from pipeline.core.errors import ConfigError
from pipeline.core.records import Targets
from pipeline.core.seeds import derive_seed
from pipeline.loading.column_moments import column_moments
from pipeline.loading.dataset import StoreDataset
from pipeline.loading.decode_threads import resolve_decode_threads
from pipeline.loading.geometry import downscale, view_images, view_targets
from pipeline.loading.jpeg_decoding import require_decoder
from pipeline.loading.loader import TrainLoader
from pipeline.loading.pixels import PixelAugmentSchedule
from pipeline.loading.regions import RegionKind
from pipeline.loading.transfer import move_batch
from pipeline.loading.views import ViewSchedule
from pipeline.losses.base import DistillationLoss, StudentOutput
from pipeline.models.additive.inputs import AdditiveMlp
from pipeline.models.classifier import Classifier
from pipeline.models.devices import resolve_device
from pipeline.models.explainers.explain import ATTRIBUTIONS, DEFAULT_EXPLAINER, EXPLAINERS
from pipeline.models.explainers.grids import map_grid, require_places, warn_of_coarse_grid
from pipeline.models.output import NO_INTERMEDIATES, Standardize
from pipeline.models.providers import build_model, freeze, teacher_input_size
from pipeline.models.saved import TrainedModel, save_model
from pipeline.training.epoch_selection import EpochSelection
from pipeline.training.guidance_targets import GuidanceSource
from pipeline.training.live_targets import LiveTeacher
from pipeline.training.loop import fit
from pipeline.training.state import ComputeSettings, Training, build_optimizer
from pipeline.training.step_threads import step_threads
from pipeline.training.superfeature_targets import SuperfeatureLevel
from pipeline.training.targets import TargetSource
from pipeline.training.transforms import BatchTransform, Mixup

logger = logging.getLogger("permafrost.training")

MAX_DOWNSCALE = 1.2
"""Maximum number of frame pixels per view pixel, above which bilinear sampling aliases."""


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Complete specification of a training."""

    dataset: StoreDataset
    model: ModelConfig
    num_classes: int
    loss: DistillationLoss
    augment: AugmentOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    seed: int
    explainer: str = DEFAULT_EXPLAINER
    teacher_weights: tuple[float, ...] = ()
    """Weights of the teachers' losses, see Training."""
    replays: bool = False
    """True to train on the views stored in the dataset's passes, which ignores `augment.operations`."""
    views_per_step: int = 1
    """Number of views of one record in a step: stored ones, or the four rotations of each new view."""
    guided_by: RegionKind | None = None
    """Kind of object regions that guide the training instead of a teacher."""
    after_epoch: Callable[[Classifier, int], bool | None] | None = None
    """Callback of the first rank with the network and the number of epochs done, before their checkpoint."""
    epoch_selection: EpochSelection | None = None
    """Callback like `after_epoch` that selects the epoch whose weights are kept; None keeps the last epoch."""
    live_teacher: ModelConfig | None = None
    """Teacher that runs in every step, None to read the targets of the dataset's passes."""
    live_explainer: ExplainerConfig = field(default_factory=GradCamConfig)
    """Explainer options of the live teacher, which select the explained classes."""
    superfeatures: SuperfeatureLevel | None = None
    """Level at which superfeatures are compared, None if the loss does not compare them."""
    transforms: tuple[BatchTransform, ...] = (Mixup(),)
    """Batch transforms, see Training."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the network's outputs, empty if they are not the classes of the data."""
        names = self.dataset.store.manifest.classes
        return names if (self.model.classes or self.num_classes) == len(names) else ()

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the student's view."""
        size = self.augment.size
        return self.dataset.store.size if size is None else (size, size)


class TrainingJob(Protocol):
    """The training that a stage requests. It is picklable, so any process can run it."""

    @property
    def folder(self) -> Path:
        """Absolute path of the run's folder, for the checkpoint and the network."""

    @property
    def trainer(self) -> TrainerOptions:
        """Trainer options, such as epochs and number of ranks."""

    def prepare(self, distributed: DistributedContext) -> None:
        """Create the files that the training reads in addition to the store, on all ranks, unless they exist."""

    def plan(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        """Build the specification of the training. Raises ConfigError if the options do not fit the store.

        distributed  ranks that share the cores of this machine, None if this process trains alone
        """

    def describe(self, plan: TrainingSpec) -> TrainedModel:
        """Return the content of model.json for the result."""


def decode_threads_of(trainer: TrainerOptions, distributed: DistributedContext | None) -> int:
    """Return the threads that decode a batch, in each of the processes on this machine that load batches."""
    ranks = 1 if distributed is None else distributed.ranks_here
    return resolve_decode_threads(trainer.decode_threads, ranks * max(trainer.loader_processes, 1))


def run_job(
    job: TrainingJob,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext | None = None,
) -> None:
    """Train to the last epoch, starting from the folder's checkpoint if there is one, and export the network."""
    distributed = distributed or DistributedContext()
    job.prepare(distributed)
    plan = job.plan(distributed)
    at_once = plan.trainer.batch_size // plan.views_per_step
    records = len(plan.dataset) // at_once * plan.trainer.batch_size
    started = time.monotonic()

    def count_cost(epoch: int, line: str) -> None:
        nonlocal started
        now = time.monotonic()
        save_cost(job.folder, now - started, records)
        started = now
        on_epoch(epoch, line)

    model = train_to_end(plan, job.folder, count_cost, distributed)
    if distributed.is_first:
        save_model(job.folder, model, job.describe(plan))


def train_to_end(
    plan: TrainingSpec,
    folder: Path,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext,
) -> Classifier:
    """Train a network, starting from the folder's checkpoint if there is one, and return it.

    Separate seeds are derived from the seed for initialization, record order, views, pixel augmentation and the random
    draws of a step.
    """
    if plan.trainer.num_threads is not None:
        torch.set_num_threads(plan.trainer.num_threads)
    training = build_training(plan, distributed)
    torch.set_num_threads(_choose_threads(plan, training, distributed))
    stream = build_loader(plan, distributed)
    fit(
        training,
        stream,
        trainer=plan.trainer,
        lr=plan.optimizer.lr,
        input_size=plan.input_size,
        folder=folder,
        on_epoch=on_epoch,
        after_epoch=plan.epoch_selection or plan.after_epoch,
    )
    if plan.epoch_selection is not None and distributed.is_first:
        plan.epoch_selection.restore(training.model)
    return training.model


def _choose_threads(plan: TrainingSpec, training: Training, distributed: DistributedContext) -> int:
    """Return the number of torch threads of this process: the option's, or one by the work of a step on the CPU."""
    available = plan.trainer.num_threads or torch.get_num_threads()
    device = next(training.model.parameters()).device
    if plan.trainer.num_threads is not None or device.type != "cpu":
        return available
    networks = [(training.model, plan.input_size)]
    if isinstance(training.targets, LiveTeacher):
        networks.append((training.targets.model, training.targets.input_size))
    of_table = plan.dataset.store.is_table
    inputs = [(net, size[1:] if of_table else (3, *size)) for net, size in networks]
    return step_threads(inputs, plan.trainer.batch_size // distributed.world_size, available)


def _check_labels(plan: TrainingSpec) -> None:
    """Raise ConfigError unless the loss and the network support the labels of the data."""
    if plan.loss.needs.labels and not plan.dataset.has_labels:
        raise ConfigError(
            "none of the records has a label of the network's classes, but the loss needs labels; choose a "
            "method without labels (method.lambda_ce=0) or data with labels"
        )
    many = plan.dataset.has_many_labels
    plan.loss.check_labels(many=many)
    if many and plan.model.classes not in (None, plan.num_classes):
        raise ConfigError(
            f"the network's option classes={plan.model.classes} is not the {plan.num_classes} classes of the "
            "labels; set it to null"
        )


def build_loader(plan: TrainingSpec, distributed: DistributedContext) -> TrainLoader:
    """Build the loader of a rank's batches."""
    return TrainLoader(
        plan.dataset,
        None if plan.replays else _build_views(plan),
        PixelAugmentSchedule(plan.augment, plan.seed),
        batch_size=plan.trainer.batch_size,
        seed=plan.seed,
        loader_processes=plan.trainer.loader_processes,
        views_per_step=plan.views_per_step,
        rank=distributed.rank,
        world_size=distributed.world_size,
    )


def build_training(plan: TrainingSpec, distributed: DistributedContext) -> Training:
    """Build the state of a training before its first step. Raises ConfigError if data, loss and network do not fit."""
    _check_labels(plan)
    trainer = plan.trainer
    device = distributed.device or resolve_device("trainer.device", trainer.device)
    decoder = plan.dataset.jpeg_decoder
    require_decoder(decoder, device, "trainer.jpeg_decoder", "the device of the training")
    torch.manual_seed(derive_seed(plan.seed, "initialisation"))
    model = build_model(plan.model, plan.num_classes, may_replace_head=True)
    if plan.model.weights is None:
        _learn_columns(model, plan.dataset)
    model = model.to(device)
    targets: TargetSource = view_targets
    if plan.live_teacher is not None:
        targets = _build_live_teacher(plan, plan.live_teacher, device)
    if plan.guided_by is not None:
        targets = GuidanceSource(plan.guided_by, plan.num_classes, plan.input_size)
    if plan.loss.needs.maps_in(0):
        _check_map_grids(plan, model, targets)
    if plan.superfeatures is not None:
        targets = plan.superfeatures.targets(targets)
    if plan.loss.needs.intermediates != NO_INTERMEDIATES:
        _build_loss_parameters(plan, model, targets, device)
    plan.loss.on_train_start(plan.dataset)
    loss = plan.loss.to(device)
    compute_settings = ComputeSettings(
        precision=getattr(torch, trainer.precision),
        compile=trainer.compile,
        channels_last=trainer.channels_last,
    )
    return Training(
        model=model,
        loss=loss,
        optimizer=build_optimizer(
            plan.optimizer,
            [*model.parameters(), *loss.parameters()],
            fused=compute_settings.precision == torch.float16,
        ),
        explain=EXPLAINERS[plan.explainer]
        if plan.guided_by is None
        else ATTRIBUTIONS[model.explainer],
        targets=targets,
        transforms=plan.transforms,
        teacher_weights=plan.teacher_weights,
        seed=plan.seed,
        compute_settings=compute_settings,
        distributed=distributed,
        has_labels=plan.dataset.has_labels and bool(plan.class_names),
    )


def _check_map_grids(plan: TrainingSpec, model: Classifier, targets: TargetSource) -> None:
    """Raise ConfigError if the explanations of the student or of a teacher have only one cell."""
    own = map_grid(model, plan.input_size)
    require_places(
        own,
        plan.input_size,
        "the student's explanations" if plan.guided_by is None else "the network's explanations",
        "raise augment.size or choose a network with a smaller stride",
    )
    taught = [
        ((spec.shape[-2], spec.shape[-1]), plan.dataset.store.size, f"the maps of {teacher.name}")
        for teacher in plan.dataset.passes
        for spec in teacher.manifest.fields
        if spec.name == "map"
    ]
    if isinstance(targets, LiveTeacher):
        size = targets.input_size
        taught = [(map_grid(targets.model, size), size, "the teacher's explanations")]
    for grid, size, whose in taught:
        require_places(grid, size, whose, "raise teacher.input_size or choose another teacher")
        warn_of_coarse_grid(own, grid)


def _learn_columns(model: Classifier, dataset: StoreDataset) -> None:
    """Set mean and spread of the columns, over the whole training split, in a network on a table."""
    if isinstance(model, AdditiveMlp) and isinstance(model.normalize, Standardize):
        (first,) = dataset.store.index.shard_numbers(dataset.rows_at(np.zeros(1, np.int64)))
        split = dataset.store.shards[int(first)].split
        model.normalize.set_moments(*column_moments(dataset.store, split))


@torch.no_grad()
def _build_loss_parameters(
    plan: TrainingSpec, model: Classifier, targets: TargetSource, device: torch.device
) -> None:
    """Run both networks on one record so that the loss can create the parameters whose shapes depend on them.

    They are drawn from a separate seed, which is the same on every rank.
    """
    batch = move_batch(plan.dataset.__getitems__([(0, 0) if plan.replays else 0]), device)
    output = model.eval()(view_images(batch, plan.input_size), plan.loss.needs.intermediates)
    grid = (output.features.shape[-2], output.features.shape[-1])
    taught = targets(batch, grid, with_maps=False)
    torch.manual_seed(derive_seed(plan.seed, "initialisation of the loss"))
    for example in taught:
        if isinstance(example, Targets):
            plan.loss.build(StudentOutput(output=output), example)


def _build_live_teacher(
    plan: TrainingSpec, config: ModelConfig, device: torch.device
) -> LiveTeacher:
    side = teacher_input_size(config)
    return LiveTeacher(
        config.name,
        freeze(build_model(config, plan.num_classes)).to(device),
        EXPLAINERS[plan.explainer],
        plan.input_size if side is None else (side, side),
        getattr(torch, plan.trainer.precision),
        plan.live_explainer,
        plan.loss.needs,
    )


_MEASURED_VIEWS = 256
"""Views that are looked at for the warning of aliasing."""


def _build_views(plan: TrainingSpec) -> ViewSchedule:
    height, width = plan.dataset.store.size
    one_aspect = plan.dataset.has_frame_aspect
    views = ViewSchedule(plan.augment, (height, width), plan.seed, one_aspect=one_aspect)
    first = plan.dataset.aspects(range(min(_MEASURED_VIEWS, len(plan.dataset))))
    worst = worst_downscale(views, plan.input_size, first)
    if worst > MAX_DOWNSCALE:
        logger.warning(
            "views downscale the canonical frame of %dx%d by a factor of up to %.1f and alias above %.1f; "
            "pack the store with a smaller frame, or raise augment.size",
            *views.size,
            worst,
            MAX_DOWNSCALE,
        )
    return views


def worst_downscale(views: ViewSchedule, input_size: tuple[int, int], aspects: Tensor) -> float:
    """Largest number of canonical pixels per pixel of a view of (height, width) `input_size`, one view per record.

    aspects  [n]: width / height of the originals
    """
    matrices = views.views(0, 0, aspects)
    if matrices is None:
        matrices = torch.eye(3)[None]
    return float(downscale(matrices, views.size, input_size).max())
