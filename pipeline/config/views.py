"""Which views of an input a teacher pass covers (`views=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from pipeline.config.options import Options
from pipeline.core.errors import require

NUM_ROTATIONS = 4


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Options):
    """The canonical view is always there; a pass of stored views lies beside it."""

    section: ClassVar[str] = "views"

    count: Annotated[int, Ge(1)] = 1
    """Stored views of each record."""
    seed: int = 0
    """Of their draws."""
    per_step: Annotated[int, Ge(1)] = 1
    """Read by distill with mode=replay: so many views of a record in each batch, from one decoded image.
    trainer.batch_size counts views."""


@dataclass(frozen=True, kw_only=True)
class CanonicalViewsConfig(ViewsConfig):
    """The whole frame alone."""

    kind: Literal["canonical"] = "canonical"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.count == 1,
            f"views.count={self.count} needs views to draw: choose views=random or views=rotations",
        )


@dataclass(frozen=True, kw_only=True)
class RandomViewsConfig(ViewsConfig):
    """Views drawn as `augment.operations` says."""

    kind: Literal["random"] = "random"
    count: int = 4


@dataclass(frozen=True, kw_only=True)
class RotationsViewsConfig(ViewsConfig):
    """The frame turned by 0, 90, 180 and 270 degrees, as SSKD needs it."""

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
