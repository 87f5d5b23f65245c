"""How a network is optimized, and how long (`optimizer=`, `trainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.config.augment import AugmentOptions
from pipeline.config.options import Options, Role
from pipeline.core.errors import require


def check_mixup_partners(augment: AugmentOptions, trainer: TrainerOptions) -> None:
    """ConfigError where a record of a rank's slice would be mixed with itself."""
    require(
        augment.mixup_alpha is None or trainer.batch_size > trainer.ranks,
        f"augment.mixup_alpha={augment.mixup_alpha}: trainer.batch_size={trainer.batch_size} leaves each of "
        f"{trainer.ranks} ranks one record and none to mix it with; raise it",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """One of torch's optimizers; weight decay applies to all parameters, as in the papers."""

    section: ClassVar[str] = "optimizer"

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Annotated[float, Gt(0)] = 3e-3
    weight_decay: Annotated[float, Ge(0)] = 1e-4
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Of sgd."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(Options):
    """How long and in what steps a network is trained."""

    section: ClassVar[str] = "trainer"

    epochs: Annotated[int, Ge(1)] = 30
    batch_size: Annotated[int, Ge(1)] = 64
    """Records of a global batch."""
    schedule: Literal["cosine", "decay", "constant"] = "cosine"
    """After the warm-up: to zero along a cosine, down by a factor now and then, or not at all. The rate is set
    once an epoch, or in every step with warmup_steps."""
    warmup_epochs: int = 0
    """Linear from 0.01 * lr."""
    warmup_steps: int | None = None
    """The same in steps, instead, as ViTs are trained; null counts epochs."""
    decay: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Of schedule=decay: the factor, every decay_every_epochs."""
    decay_every_epochs: Annotated[int, Ge(1)] = 30
    clip_norm: Annotated[float | None, Gt(0)] = 1.0
    """Largest global gradient norm; null does not clip."""
    agc: Annotated[float | None, Gt(0)] = None
    """Adaptive clipping instead, as B-cos networks are trained with (0.01): the largest norm of a unit's
    gradient in norms of its weight. Needs clip_norm=null."""
    ranks: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 1
    """Processes that train together, each on its slice of the global batch; above 1 by Ray Train."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward and backward pass (torch.autocast). Losses stay float32, and so does GradCAM of a linear head,
    whose weights are the explanation; explanations that are gradients (B-cos weights, class tokens) are gradients of
    the half-precision graph, cast to float32 afterwards."""
    compile: bool = False
    """torch.compile of the student's forward pass, where its explanation needs no double backward."""
    channels_last: bool = False
    """Memory format of the network and its images: faster convolutions in half precision."""
    num_threads: Annotated[int | None, Ge(1)] = None
    """Of torch on the CPU; null leaves torch's own choice."""
    loader_processes: Annotated[int, Ge(0), Role.OUTSIDE_IDENTITY] = 0
    checkpoint_every_epochs: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 1
    checkpoint_every_steps: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Also within an epoch, for epochs that are too long to lose."""
    log_every_steps: Annotated[int, Ge(1), Role.OUTSIDE_IDENTITY] = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.batch_size % self.ranks == 0,
            f"trainer.batch_size={self.batch_size} is not a multiple of trainer.ranks={self.ranks}",
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"trainer.warmup_epochs must be in [0, epochs), got {self.warmup_epochs} of {self.epochs}",
        )
        require(
            self.warmup_steps is None or (self.warmup_steps >= 1 and self.warmup_epochs == 0),
            f"trainer.warmup_steps={self.warmup_steps} must be >= 1 and takes the place of "
            f"trainer.warmup_epochs={self.warmup_epochs}; set that one to 0",
        )
        require(
            self.agc is None or self.clip_norm is None,
            f"trainer.agc={self.agc} takes the place of trainer.clip_norm={self.clip_norm}; set "
            "trainer.clip_norm=null beside it",
        )
