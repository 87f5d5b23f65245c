"""What an evaluation looks at and what a report shows of it (`evaluate=`, `report=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from pipeline.config.evaluators import EvaluatorSections
from pipeline.config.options import Options, Role
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EvaluatorSections):
    """What an evaluation looks at."""

    section: ClassVar[str] = "evaluate"

    store: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Another store to judge on, as after data-free transfer: the student learned its teacher's classes on
    other images, and is judged on the teacher's own. The same teacher must have been asked there too."""
    splits: tuple[str, ...] = ("test",)
    """Of the store; `holdout` is what subset.holdout kept out of the student's own training."""
    batch_size: Annotated[int, Ge(1)] = 256
    frame: Literal["auto", "center_crop", "full"] = "auto"
    """What part of an image is judged: all of it, or the field's centre crop of 7/8 of the shorter side
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


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What a report shows."""

    section: ClassVar[str] = "report"

    title: str = "Distillation report"
    columns: dict[str, str] = field(default_factory=dict)
    """Name -> <split>.<metric> of evaluate, <split>.<judge>.<metric>, or all.<metric> for the mean over splits;
    empty takes accuracy and agreement of the split `test`."""
    runs: tuple[str, ...] = ()
    """Others to compare with `run`: sweeps, or runs of one student."""
    baseline: str = "kd"
    candidate: str = "e2kd"
    """The paired difference is candidate - baseline, seed by seed."""
    paired_column: str = "accuracy"
    next_command: str = ""
    """Printed last: what to try now."""
    contact_records: Annotated[int, Ge(0)] = 8
    """Records on the contact sheet of the store and its teachers' maps; 0 leaves it out."""
    contact_views: Annotated[int, Ge(0)] = 2
    """Random views (`augment=`) of each of them."""
    cases: Annotated[int, Ge(0)] = 8
    """Records of each split, shown with the maps of teacher, baseline and candidate: chosen by a rule (the page
    states it) from the records.parquet of both; 0 leaves them out."""
    case_shift: Annotated[int | None, Ge(1)] = None
    """Pixels along the diagonal by which the first of them are moved, to see whether the explanations move along
    (e2KD, Figure A5: 8); null leaves that out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.columns:
            object.__setattr__(self, "columns", {n: f"test.{n}" for n in ("accuracy", "agreement")})
        require(
            self.paired_column in self.columns,
            f"report.paired_column={self.paired_column} is not one of report.columns: {', '.join(self.columns)}",
        )
