"""One step, one epoch, checkpoints: the same loop for teachers and students."""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from pipeline.clipping import clip_by_unit
from pipeline.config import ConfigError
from pipeline.explainers import DEFAULT_EXPLAINER, EXPLAINERS, Explainer
from pipeline.geometry import view_images, view_targets
from pipeline.losses.terms import StudentOutput, weighted_sum
from pipeline.metric_log import MetricWriter, StepLog
from pipeline.ranks import Ranks
from pipeline.schedule import check_warmup, learning_rate
from pipeline.seeds import derive_seed
from pipeline.store.files import write_atomically
from pipeline.stream import move_batch
from pipeline.superfeatures.comparison import add_chimeras, label_chimeras
from pipeline.teacher_phase import learn_from_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from pipeline.config import OptimizerConfig, TrainerConfig
    from pipeline.losses.terms import DistillationLoss, LossTerms
    from pipeline.models.classifier import Classifier
    from pipeline.models.output import Inner, ModelOutput
    from pipeline.records import Batch, Targets
    from pipeline.regions import Guidance
    from pipeline.stream import TrainingStream
    from pipeline.superfeatures.comparison import Comparison

CHECKPOINT_NAME = "checkpoint.pt"


# ---- parts ---------------------------------------------------------------------------------------


def resolve_device(option: str, name: str) -> torch.device:
    """The device that an option names; `auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"{option}={name} cannot be used here: {error}") from error
    return device


def build_optimizer(
    config: OptimizerConfig, parameters: list[nn.Parameter], *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimiser that `optimizer=` names, over all parameters alike.

    fused  one that skips a step of infinite gradients by itself: a GradScaler then never waits
    """
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": fused or None}
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, **common)
    if config.kind == "adam":
        return torch.optim.Adam(parameters, config.lr, **common)
    return torch.optim.AdamW(parameters, config.lr, **common)


class TargetSource(Protocol):
    """What the teachers say about a batch under its views: stored, or asked now."""

    def __call__(
        self,
        batch: Batch,
        grid: tuple[int, int],
        map_control: str = "none",
        *,
        with_maps: bool = True,
    ) -> tuple[Targets | Guidance, ...]:
        """One a teacher, maps on the student's (h, w) `grid`."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How the student's forward and backward pass are computed; never what."""

    precision: torch.dtype = torch.float32
    """Of torch.autocast; the parameters, the loss and the explanations stay float32."""
    compile: bool = False
    channels_last: bool = False


@dataclass(kw_only=True)
class Training:
    """A model that learns, and where it is; what changes is in its checkpoints."""

    model: Classifier
    loss: DistillationLoss
    optimizer: torch.optim.Optimizer
    explain: Explainer = EXPLAINERS[DEFAULT_EXPLAINER]
    """The teacher's own, so that equal maps mean equal explanations; not in a checkpoint."""
    targets: TargetSource = view_targets
    teacher_weights: tuple[float, ...] = ()
    """Of each teacher's loss, summing to 1; empty weighs all alike."""
    superfeatures: Comparison | None = None
    """The level at which they are compared, where the loss compares them."""
    seed: int = 0
    """Of what a step draws by itself, such as a dropout's mask."""
    numerics: Numerics = field(default_factory=Numerics)
    ranks: Ranks = field(default_factory=Ranks)
    epoch: int = 0
    step: int = 0
    """Of the epoch: the next one to take."""
    global_step: int = 0
    forward: nn.Module = field(init=False)
    """The model as it is called: averaging gradients over ranks, compiled, or itself."""
    scaler: torch.amp.GradScaler = field(init=False)
    """Keeps float16 gradients from vanishing; does nothing in other precisions."""

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.loss.ranks = self.ranks
        if self.numerics.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.forward = self.ranks.wrap(self.model, device)
        if self.numerics.compile:
            self._refuse_double_backward()
            self.forward = cast("nn.Module", torch.compile(self.forward))
        half = self.numerics.precision == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def _refuse_double_backward(self) -> None:
        if self.loss.needs_maps(0) and self.model.train().head is None:
            raise ConfigError(
                "trainer.compile=true: this student's explanation differentiates its head by autograd, and a "
                "compiled pass cannot be differentiated twice; set trainer.compile=false, or choose a student "
                "whose head is linear on the average of its features"
            )

    def state(self) -> dict[str, Any]:
        """For `load_state`: tensors and plain values, the live ones; save or copy it before training on."""
        return {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": [self.epoch, self.step, self.global_step],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken, by any number of ranks."""
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.global_step = state["position"]

    def seed_step(self) -> None:
        """Seed what the next step draws: a function of (seed, step, rank), so no state has to be kept."""
        torch.manual_seed(derive_seed(self.seed, "step", self.global_step, self.ranks.rank))


# ---- one step ------------------------------------------------------------------------------------


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
        clip_by_unit(_parameters(training), agc)
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


# ---- epochs --------------------------------------------------------------------------------------


def fit(
    training: Training,
    stream: TrainingStream,
    *,
    trainer: TrainerConfig,
    lr: float,
    input_size: tuple[int, int],
    folder: Path,
    on_epoch: Callable[[int, str], None],
    after_epoch: Callable[[Classifier, int], None] | None = None,
) -> None:
    """Train to the last epoch, from the folder's checkpoint where there is one.

    Writes checkpoint.pt, metrics.jsonl and TensorBoard events into `folder`; of several ranks the first does.
    on_epoch     called by the first rank after each epoch with its number and a line on how it went
    after_epoch  called by the first rank before an epoch's checkpoint, with the network and the epochs done
    """
    device = next(training.model.parameters()).device
    check_warmup(trainer, stream.num_steps)
    is_new = not (folder / CHECKPOINT_NAME).exists()
    load_checkpoint(training, folder)
    if is_new and training.loss.teacher_phase is not None:
        learn_from_teacher(training, stream)
        save_checkpoint(training, folder)
    with ExitStack() as stack:
        write = _discard
        if training.ranks.is_first:
            write = stack.enter_context(MetricWriter(folder, training.global_step)).write
        log = StepLog(write=write, every_steps=trainer.log_every_steps)
        while training.epoch < trainer.epochs:
            for batch in stream.epoch(training.epoch, training.step):
                moved = move_batch(batch, device)
                training.seed_step()
                rate = learning_rate(trainer, lr, training.epoch, training.step, stream.num_steps)
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                terms = train_step(training, moved, input_size, trainer.clip_norm, trainer.agc)
                training.step += 1
                training.global_step += 1
                log.add(training, terms, len(batch.keys))
                if training.step < stream.num_steps and _is_nth(
                    training.global_step, trainer.checkpoint_every_steps
                ):
                    log.flush(training)
                    save_checkpoint(training, folder)
            log.flush(training)
            training.epoch, training.step = training.epoch + 1, 0
            if after_epoch is not None and training.ranks.is_first:
                after_epoch(training.model, training.epoch)
            if training.epoch == trainer.epochs or _is_nth(
                training.epoch, trainer.checkpoint_every_epochs
            ):
                save_checkpoint(training, folder)
            if training.ranks.is_first:
                on_epoch(training.epoch, f"loss {log.last_total:.3f}")


def _is_nth(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0


def _discard(line: dict[str, float]) -> None:
    """The first rank's line says it for all."""


# ---- what is written -----------------------------------------------------------------------------


def save_checkpoint(training: Training, folder: Path) -> None:
    """Write the whole state in one commit: the old checkpoint stands until the new one does."""
    if not training.ranks.is_first:
        return
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    write_atomically(folder / CHECKPOINT_NAME, buffer.getvalue())


def load_checkpoint(training: Training, folder: Path) -> None:
    """Go on from the folder's checkpoint, every rank from the same; nothing happens where there is none."""
    path = folder / CHECKPOINT_NAME
    if path.exists():
        device = next(training.model.parameters()).device
        training.load_state(torch.load(path, map_location=device, weights_only=True))
    training.ranks.require_equal(
        [training.epoch, training.step, training.global_step],
        f"ranks found different checkpoints in {folder}: the run's folder must lie on storage that all nodes share",
    )
