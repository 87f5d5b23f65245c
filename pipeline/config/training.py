"""How a network is optimised, and how long (`optimizer=`, `trainer=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.augment import AugmentConfig
from pipeline.core.errors import require


def check_mixup_partners(augment: AugmentConfig, trainer: TrainerConfig) -> None:
    """ConfigError where a record of a rank's slice would be mixed with itself."""
    require(
        augment.mixup_alpha is None or trainer.batch_size > trainer.ranks,
        f"augment.mixup_alpha={augment.mixup_alpha}: trainer.batch_size={trainer.batch_size} leaves each of "
        f"{trainer.ranks} ranks one record and none to mix it with; raise it",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One of torch's optimisers; weight decay applies to all parameters, as in the papers."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of sgd."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be > 0, got {self.lr}")
        require(
            self.weight_decay >= 0, f"optimizer.weight_decay must be >= 0, got {self.weight_decay}"
        )
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and in what steps a network is trained."""

    epochs: int = 30
    batch_size: int = 64
    """Records of a global batch."""
    schedule: Literal["cosine", "decay", "constant"] = "cosine"
    """After the warm-up: to zero along a cosine, down by a factor now and then, or not at all. The rate is set
    once an epoch, or in every step with warmup_steps."""
    warmup_epochs: int = 0
    """Linear from 0.01 * lr."""
    warmup_steps: int | None = None
    """The same in steps, instead, as ViTs are trained; null counts epochs."""
    decay: float = 0.1
    """Of schedule=decay: the factor, every decay_every_epochs."""
    decay_every_epochs: int = 30
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    agc: float | None = None
    """Adaptive clipping instead, as B-cos networks are trained with (0.01): the largest norm of a unit's
    gradient in norms of its weight. Needs clip_norm=null."""
    ranks: int = 1
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
    num_threads: int | None = None
    """Of torch on the CPU; null leaves torch's own choice."""
    loader_processes: int = 0
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    """Also within an epoch, for epochs that are too long to lose."""
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "ranks",
            "decay_every_epochs",
            "checkpoint_every_epochs",
            "log_every_steps",
        ):
            require(
                getattr(self, name) >= 1, f"trainer.{name} must be >= 1, got {getattr(self, name)}"
            )
        require(
            self.batch_size % self.ranks == 0,
            f"trainer.batch_size={self.batch_size} is not a multiple of trainer.ranks={self.ranks}",
        )
        require(
            self.checkpoint_every_steps is None or self.checkpoint_every_steps >= 1,
            f"trainer.checkpoint_every_steps must be >= 1 or null, got {self.checkpoint_every_steps}",
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
        require(0 < self.decay < 1, f"trainer.decay must be in (0, 1), got {self.decay}")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"trainer.clip_norm must be > 0 or null, got {self.clip_norm}",
        )
        require(
            self.agc is None or self.agc > 0, f"trainer.agc must be > 0 or null, got {self.agc}"
        )
        require(
            self.agc is None or self.clip_norm is None,
            f"trainer.agc={self.agc} takes the place of trainer.clip_norm={self.clip_norm}; set "
            "trainer.clip_norm=null beside it",
        )
        require(
            self.loader_processes >= 0,
            f"trainer.loader_processes must be >= 0, got {self.loader_processes}",
        )
        require(
            self.num_threads is None or self.num_threads >= 1,
            f"trainer.num_threads must be >= 1 or null, got {self.num_threads}",
        )
