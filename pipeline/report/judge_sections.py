"""What the judges found, as sections of the page: a table and a figure for each judge that looked."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pipeline.report.results import StudentResult


class Section(NamedTuple):
    """Of one judge."""

    anchor: str
    title: str
    lead: str
    """What to look for."""


def judge_sections(results: list[StudentResult], teacher: StudentResult | None) -> list[Section]:
    """Those of judges that looked at any of them."""
    return []
