"""What an evaluation looks at (`evaluate=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.config.evaluators import EvaluatorSections
from pipeline.config.options import Role
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluatorSections):
    """What an evaluation looks at."""

    section: ClassVar[str] = "evaluate"

    store: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Another store to evaluate on, as after data-free transfer: the student learned its teacher's classes on
    other images, and is evaluated on the teacher's own. The same teacher must have been asked there too."""
    splits: tuple[str, ...] = ("test",)
    """Of the store; `holdout` is what subset.holdout kept out of the student's own training."""
    batch_size: Annotated[int, Ge(1)] = 256
    frame: Literal["auto", "center_crop", "full"] = "auto"
    """What part of an image is evaluated: all of it, or the field's center crop of 7/8 of the shorter side
    in the original's proportions. auto takes all where the student's input is the canonical frame."""
    region: Literal["boxes", "masks"] = "boxes"
    """Where an explanation should lie, for EPG and IoU; of many labels a mask's values are the classes + 1."""
    iou_threshold: Annotated[float, Ge(0), Lt(1)] = 0.05
    """On the map scaled to [0, 1]; strict."""
    group_sets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> groups to score together, beside each group alone; of Waterbirds {id: [0, 3], ood: [1, 2]}."""
    num_pictures: Annotated[int, Ge(0)] = 8
    """Records whose maps are kept for the report, about as many of each split."""
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.splits) > 0, "evaluate.splits is empty; name at least one split of the store"
        )
        for name, groups in self.group_sets.items():
            require(
                name.isidentifier() and len(groups) > 0 and len(set(groups)) == len(groups),
                f"evaluate.group_sets is a name (a word) and its groups, each once, got {name}: {list(groups)}",
            )
