"""Optimization of a network (`optimizer=`, `trainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from permafrost.config.augment import AugmentOptions
from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.core.errors import require

TRACKERS: Family[str] = Family({"tensorboard": "permafrost.runs.trackers:TensorBoard"})
"""Trackers (`logger=`) by the name of their package: module:name of a TrackerClient (permafrost/runs/trackers.py)."""
Logger = Annotated[str, Role.OUTSIDE_IDENTITY]
"""Tracker that shows the numbers of a training and of its evaluations."""


def check_pairs(augment: AugmentOptions, trainer: TrainerOptions, per_step: int = 1) -> None:
    """Check that both records of each mixed pair are in the same rank's slice of the batch.

    Args:
        augment: Options with `augment.mix`.
        trainer: Size of the batches and number of ranks.
        per_step: Number of views of a record in a batch.

    Raises:
        ConfigError: If they are not.
    """
    ranks = trainer.ranks
    pair = 2 * per_step
    require(
        not augment.mixes or trainer.batch_size % (pair * ranks) == 0,
        f"augment.mix mixes pairs of records, and trainer.batch_size={trainer.batch_size} leaves {ranks} rank"
        f"{'' if ranks == 1 else 's'} {trainer.batch_size / ranks:g} rows each, which cannot be paired; make it a "
        f"multiple of {pair * ranks}",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """Optimizer of torch; weight decay applies to all parameters, as in the papers."""

    section: ClassVar[str] = "optimizer"

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Gt(0)] = 3e-3
    """Learning rate."""
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    """Weight decay."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Momentum of sgd."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(Options):
    """Length, batches, schedule and numerics of the training."""

    section: ClassVar[str] = "trainer"

    epochs: Annotated[int, Ge(1)] = 30
    """Number of epochs."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Records per global batch; those of the selection, as far as ranks share them equally, if it has fewer."""
    sampling: Annotated[Literal["uniform", "sqrt", "balanced"], Role.IF_SET] = "uniform"
    """Probability of a class: proportional to its number of records (uniform: each once per epoch) or to the square
    root of it, or the same for all (balanced). An epoch has as many records as before; those of a small class repeat in
    other views, all equally often. Groups of data.group share the draws of their class equally. Unlabeled records
    are a class. For many labels per record use data.weight."""
    schedule: Literal["cosine", "decay", "constant"] = "cosine"
    """Schedule of the learning rate after the warm-up: to zero along a cosine, a decay by a factor, or
    constant. The rate is set once per epoch, or in every step if warmup_steps is set."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up from 0.01 * lr."""
    warmup_steps: int | None = None
    """Steps of linear warm-up in place of warmup_epochs, as for ViTs; null uses epochs."""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Factor of schedule=decay, applied every decay_every_epochs."""
    decay_every_epochs: Annotated[int, Ge(1)] = 30
    """Interval in epochs of schedule=decay."""
    clip_norm: Annotated[float | None, Gt(0)] = 1.0
    """Largest global gradient norm; null disables clipping."""
    agc: Annotated[float | None, Gt(0)] = None
    """Adaptive gradient clipping in place of clip_norm; null disables it. It is the largest norm of a unit's
    gradient relative to the norm of its weight (0.01 for B-cos networks). Needs clip_norm=null."""
    ema: Annotated[float | None, Gt(0), Lt(1), Role.IF_SET] = None
    """Decay of the exponential moving average of the weights after every step, as in 0.999; the average is what is
    evaluated, saved and exported. It begins with the weights after the first step and averages the statistics of batch
    norms, too; the logged training accuracy is the one without it. null saves the weights of the last step. An
    average over more steps than a third of the training keeps weights of its beginning."""
    ranks: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 1
    """Number of training processes, each with its slice of the global batch; more than 1 run with Ray Train."""
    device: str = "auto"
    """Device of torch; auto takes a GPU if there is one."""
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "float32"
    """Precision of the forward and backward pass (torch.autocast). float32 is that of IEEE 754 on GPUs, too, and tf32
    what torch calls so by default on NVIDIA GPUs since Ampere: convolutions and products of 10 bits. auto:
    bfloat16 on a GPU with tensor cores for it or a CPU with AMX, else float32; model.json states which, and a
    resumed training keeps it. Losses stay float32, as does GradCAM of a linear head, whose weights are the
    explanation. Explanations that are gradients (B-cos weights, class tokens) are gradients of the half-
    precision graph, then cast to float32."""
    deterministic: Annotated[bool, Role.OUTSIDE_IDENTITY] = True
    """On a GPU, use algorithms whose sums have a fixed order, so that a training that is repeated or resumed on a GPU
    of the same model has the same weights. A warning names operations that have none. false may be faster."""
    compile: bool = False
    """torch.compile of the student's forward pass, used if its explanation needs no double backward."""
    channels_last: bool | None = None
    """Channels-last memory format of the network and its images, for faster convolutions. null: for networks of
    torchvision and timm."""
    num_threads: Annotated[int | None, Ge(1)] = None
    """Number of torch threads on the CPU; null takes one per 0.25 G multiply-accumulates of a
    step, at most as many as there are cores."""
    loader_processes: Annotated[int, Ge(0), Role.OUTSIDE_IDENTITY] = 0
    """Worker processes of the data loader. Their batches are in shared memory, of which a container has 64 MB unless it
    is started with more (docker run --shm-size=8g)."""
    decode_threads: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Threads that decode a batch, in each process that loads batches; null takes that process's share
    of the cores of its machine, at most 8. Files below 4 kB on average are decoded in one thread."""
    checkpoint_every_epochs: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 1
    """Epochs between checkpoints."""
    checkpoint_every_steps: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Steps between checkpoints within an epoch, for long epochs; null saves only after epochs."""
    keep_checkpoint: Annotated[bool, Role.OUTSIDE_IDENTITY] = False
    """Keep checkpoint.pt, and the weights of the selected epoch in a file of their own, when the training is finished;
    under Adam three times the weights."""
    log_every_steps: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 20
    """Steps between logged metrics."""

    def _check_together(self) -> None:
        require(
            self.batch_size % self.ranks == 0,
            f"trainer.batch_size={self.batch_size} is not a multiple of trainer.ranks={self.ranks}",
        )
        require(
            self.ranks == 1 or ":" not in self.device,
            f"trainer.device={self.device} is one device, and each of trainer.ranks={self.ranks} needs its own; set "
            "it to auto or cuda",
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"trainer.warmup_epochs must be in [0, epochs), got {self.warmup_epochs} of {self.epochs}",
        )
        require(
            self.warmup_steps is None or (self.warmup_steps >= 1 and self.warmup_epochs == 0),
            f"trainer.warmup_steps={self.warmup_steps} must be >= 1 and replaces "
            f"trainer.warmup_epochs={self.warmup_epochs}; set trainer.warmup_epochs=0",
        )
        require(
            self.agc is None or self.clip_norm is None,
            f"trainer.agc={self.agc} replaces trainer.clip_norm={self.clip_norm}; also set "
            "trainer.clip_norm=null",
        )
