"""Options of a report: its columns, its comparison and its pictures (`report=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge

from pipeline.config.options import Options
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What a report shows."""

    section: ClassVar[str] = "report"

    title: str = "Distillation report"
    columns: dict[str, str] = field(default_factory=dict)
    """Name -> <split>.<metric> of evaluate, <split>.<evaluator>.<metric>, or all.<metric> for the mean over splits;
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
