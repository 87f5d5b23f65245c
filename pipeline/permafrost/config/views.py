"""Views of an input that a teacher pass covers (`views=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from permafrost.config.options import Options
from permafrost.core.errors import require

NUM_ROTATIONS = 4


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Options):
    """Stored views of a teacher pass, in addition to the canonical view, which always exists."""

    section: ClassVar[str] = "views"

    count: Annotated[int, Ge(1)] = 1
    """Stored views per record."""
    seed: int = 0
    """Seed of the views' random draws."""
    per_step: Annotated[int, Ge(1)] = 1
    """Views of each record in a batch, from one decoded image; read by distill with mode=replay.
    trainer.batch_size counts views."""


@dataclass(frozen=True, kw_only=True)
class CanonicalViewsConfig(ViewsConfig):
    """Whole frame only."""

    kind: Literal["canonical"] = "canonical"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.count == 1,
            f"views.count={self.count} requires drawn views: choose views=random or views=rotations",
        )


@dataclass(frozen=True, kw_only=True)
class RandomViewsConfig(ViewsConfig):
    """Random views drawn from `augment.operations`."""

    kind: Literal["random"] = "random"
    count: int = 4


@dataclass(frozen=True, kw_only=True)
class RotationsViewsConfig(ViewsConfig):
    """Frame rotated by 0, 90, 180 and 270 degrees."""

    kind: Literal["rotations"] = "rotations"
    count: int = NUM_ROTATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.count == NUM_ROTATIONS,
            f"views.count={self.count}: views=rotations has exactly {NUM_ROTATIONS}",
        )


AnyViewsConfig = CanonicalViewsConfig | RandomViewsConfig | RotationsViewsConfig

VIEWS: dict[str, type[ViewsConfig]] = {
    cls.kind: cls for cls in (CanonicalViewsConfig, RandomViewsConfig, RotationsViewsConfig)
}
