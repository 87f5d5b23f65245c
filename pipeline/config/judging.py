"""What an evaluation looks at and what a report shows of it (`evaluate=`, `report=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.judges import DistanceCorrelationOptions, UnicamOptions
from pipeline.config.study import (
    ClassSimilarityOptions,
    DiffroarOptions,
    DissectionOptions,
    FiveBandOptions,
    GradientAlignmentOptions,
)
from pipeline.core.errors import require

JudgeName = Literal[
    "accuracy",
    "localization",
    "shift",
    "superfeatures",
    "distance_correlation",
    "unicam",
    "gradient_alignment",
    "class_similarity",
    "five_band",
    "dissection",
    "diffroar",
]
"""The judges, key by key those of evaluation.judges.JUDGES; one that has options has a section of its name in
EvaluateOptions."""
ASK_TEACHER: frozenset[JudgeName] = frozenset({"distance_correlation", "unicam"})
"""Judges that may ask the teacher network itself; for all others `teacher` is not read."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at."""

    store: str | None = None
    """Another store to judge on, as after data-free transfer: the student learned its teacher's classes on
    other images, and is judged on the teacher's own. The same teacher must have been asked there too."""
    splits: tuple[str, ...] = ("test",)
    """Of the store; `holdout` is what subset.holdout kept out of the student's own training."""
    batch_size: int = 256
    frame: Literal["auto", "center_crop", "full"] = "auto"
    """What part of an image is judged: all of it, or the field's centre crop of 7/8 of the shorter side
    in the original's proportions. auto takes all where the student's input is the canonical frame."""
    region: Literal["boxes", "masks"] = "boxes"
    """Where an explanation should lie, for EPG and IoU; of many labels a mask's values are the classes + 1."""
    iou_threshold: float = 0.05
    """On the map scaled to [0, 1]; strict."""
    group_sets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> groups to score together, beside each group alone; of Waterbirds {id: [0, 3], ood: [1, 2]}."""
    max_shift: int | None = None
    """Pixels up to which the input is shifted for the shift-equivariance curve of the student's explanation
    (e2KD, Figure 5: 32); null measures none. Wants frames that are larger than the student's input by as much."""
    shift_records: int = 256
    """Of each split, for that curve; every shift is a forward pass of each."""
    distance_correlation: DistanceCorrelationOptions = field(
        default_factory=DistanceCorrelationOptions
    )
    unicam: UnicamOptions = field(default_factory=UnicamOptions)
    num_pictures: int = 8
    """Records whose maps are kept for the report, about as many of each split."""
    device: str = "auto"
    gradient_alignment: GradientAlignmentOptions = field(default_factory=GradientAlignmentOptions)
    class_similarity: ClassSimilarityOptions = field(default_factory=ClassSimilarityOptions)
    five_band: FiveBandOptions = field(default_factory=FiveBandOptions)
    dissection: DissectionOptions = field(default_factory=DissectionOptions)
    diffroar: DiffroarOptions = field(default_factory=DiffroarOptions)

    def __post_init__(self) -> None:
        require(
            len(self.splits) > 0, "evaluate.splits is empty; name at least one split of the store"
        )
        require(self.batch_size >= 1, f"evaluate.batch_size must be >= 1, got {self.batch_size}")
        require(
            0 <= self.iou_threshold < 1,
            f"evaluate.iou_threshold must be in [0, 1), got {self.iou_threshold}",
        )
        require(
            self.max_shift is None or self.max_shift >= 1,
            f"evaluate.max_shift must be >= 1 or null, got {self.max_shift}",
        )
        require(
            self.shift_records >= 1,
            f"evaluate.shift_records must be >= 1, got {self.shift_records}",
        )
        for name, groups in self.group_sets.items():
            require(
                name.isidentifier() and len(groups) > 0 and len(set(groups)) == len(groups),
                f"evaluate.group_sets is a name (a word) and its groups, each once, got {name}: {list(groups)}",
            )
        require(
            self.num_pictures >= 0, f"evaluate.num_pictures must be >= 0, got {self.num_pictures}"
        )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report shows."""

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
    contact_records: int = 8
    """Records on the contact sheet of the store and its teachers' maps; 0 leaves it out."""
    contact_views: int = 2
    """Random views (`augment=`) of each of them."""
    cases: int = 8
    """Records of each split, shown with the maps of teacher, baseline and candidate: chosen by a rule (the page
    states it) from the records.parquet of both; 0 leaves them out."""
    case_shift: int | None = None
    """Pixels along the diagonal by which the first of them are moved, to see whether the explanations move along
    (e2KD, Figure A5: 8); null leaves that out."""

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", {n: f"test.{n}" for n in ("accuracy", "agreement")})
        for name in ("contact_records", "contact_views", "cases"):
            require(
                getattr(self, name) >= 0, f"report.{name} must be >= 0, got {getattr(self, name)}"
            )
        require(
            self.case_shift is None or self.case_shift >= 1,
            f"report.case_shift must be >= 1 or null, got {self.case_shift}",
        )
        require(
            self.paired_column in self.columns,
            f"report.paired_column={self.paired_column} is not one of report.columns: {', '.join(self.columns)}",
        )
