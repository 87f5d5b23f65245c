"""Verbs `report` and `show`, and the method `show` of an opened store: their options, and how they enter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from permafrost.config.augment import AugmentOptions
from permafrost.config.options import Command, Options
from permafrost.config.store import STORE_METHODS, StoreOptions
from permafrost.config.verbs import SWEEP_SUMMARIES, VERBS, Verb
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Contents of a report."""

    section: ClassVar[str] = "report"

    title: str = "Distillation report"
    """Title of the page."""
    note: str = ""
    """Paragraph below the summary, such as one on what the numbers do not show."""
    columns: dict[str, str] = field(default_factory=dict)
    """Mapping from column name to metric; empty takes accuracy (or F1), agreement, EPG and IoU of every evaluated
    split, as far as they were measured. A metric is <split>.<metric> of evaluate, <split>.<evaluator>.<metric>, or
    all.<metric> for the mean over splits."""
    runs: tuple[str, ...] = ()
    """Other runs to compare with `run`: sweeps, or runs of one student. Students of sweeps that differ in the seed
    only are seeds of one variant."""
    baseline: str = "kd"
    """Variant of the sweep that the candidate is compared with."""
    candidate: str = "e2kd"
    """Variant of the sweep that is compared with the baseline."""
    baselines: dict[str, str] = field(default_factory=dict)
    """Baselines of variants that are not compared with `baseline` in the table of differences, by variant, as in
    {e2kd_200: kd_200}."""
    compared_column: str | None = None
    """Column of the summary and of candidate - baseline, one of `columns`; null takes accuracy if it is a column,
    and the first column otherwise."""
    plotted: tuple[str, ...] = ()
    """Columns that are plotted over each numeric option of the sweep's grid; empty takes compared_column."""
    format: Literal["page", "latex"] = "page"
    """latex also prints the table of the variants for a paper (booktabs), and writes it to report.tex."""
    next_command: str = ""
    """Command to suggest as the next step, printed last."""
    contact_records: Annotated[int, Ge(0)] = 8
    """Number of records on the contact sheet of the store and its teachers' maps; 0 omits the sheet."""
    contact_views: Annotated[int, Ge(0)] = 2
    """Number of random views (`augment=`) of each record on the contact sheet."""
    cases: Annotated[int, Ge(0)] = 8
    """Number of records per split shown with the maps of teacher, baseline and candidate; 0 omits them. They
    are selected from the records.parquet of both by a rule that the page states."""
    case_shift: Annotated[int | None, Ge(1)] = None
    """Shift in pixels along the diagonal at which the first cases are shown again; null omits this. It compares
    how the explanations move with the image (e2KD, Figure A5: 8)."""

    def _check_together(self) -> None:
        if self.columns:
            self.check_names(self.columns)

    def check_names(self, columns: Collection[str]) -> None:
        """Check that compared_column and plotted are empty or name columns of the report.

        Args:
            columns: Names of the columns.

        Raises:
            ConfigError: If they do not.
        """
        for option, names, empty in (
            ("compared_column", [self.compared_column] if self.compared_column else [], "null"),
            ("plotted", self.plotted, "[]"),
        ):
            for name in names:
                require(
                    name in columns,
                    f"report.{option}={name} is not one of report.columns: {', '.join(columns)}; choose one of them, "
                    f"or leave it {empty}",
                )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Sections that `report` reads."""

    store: StoreOptions
    augment: AugmentOptions
    report: ReportOptions
    run: str = ""
    """Folder below runs/ of the sweep or student to report; without one, the report is of the store alone."""
    command: Command = ()
    """Command of the report, which the page repeats."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Content and file of the picture of a store."""

    section: ClassVar[str] = "show"

    split: str | None = None
    """Split whose records are shown; null shows train, or the first split of a store without it."""
    records: Annotated[int, Ge(1), Le(200)] = 24
    """Number of records that are shown."""
    output: str = "store.png"
    """File of the picture: .png, .svg or .pdf."""

    def _check_together(self) -> None:
        require(
            self.output.endswith((".png", ".svg", ".pdf")),
            f"show.output={self.output} must end with .png, .svg or .pdf",
        )


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Options):
    """Sections that `show` reads."""

    store: StoreOptions
    show: ShowOptions


VERBS["report"] = Verb(
    options=ReportConfig,
    function="permafrost_report.report:report_run",
    order=75,
    common=(
        "run store.path report.title report.columns report.baseline report.candidate "
        "report.compared_column report.plotted report.runs report.cases report.contact_records "
        "report.format augment augment.size store.teacher"
    ),
    needs_run=False,
    takes_store_of_run=True,
    saves_options=True,
    python="Write the page of a run or a sweep. The result has the file `html`.",
)
VERBS["show"] = Verb(
    options=ShowConfig,
    function="permafrost_report.show:show_store",
    order=45,
    common="store.path store.teacher show.split show.records show.output",
)
SWEEP_SUMMARIES["table"] = "permafrost_report.main_table:summary_table"
STORE_METHODS["show"] = "permafrost_report.store_sheet:show_records"
