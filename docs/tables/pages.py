"""Pages with generated tables, and the table of each name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docs.claims import e2kd as e2kd_claims
from docs.claims import interpretability as study_claims
from docs.claims import ked as ked_claims
from docs.claims import unicam as unicam_claims
from docs.claims.sections import claims_of
from docs.measured import ROOT
from docs.tables import (
    benchmarks,
    e2kd,
    frozen_features,
    interpretability,
    ked,
    overview,
    source_files,
    training_length,
    unicam,
)

MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def claims_e2kd() -> str:
    """Claims of e2KD, with commands and results."""
    return claims_of(e2kd_claims.CLAIMS)


def claims_ked() -> str:
    """Claims of KED."""
    return claims_of(ked_claims.CLAIMS)


def claims_unicam() -> str:
    """Claims of UniCAM."""
    return claims_of(unicam_claims.CLAIMS)


def claims_interpretability() -> str:
    """Claims of the interpretability study."""
    return claims_of(study_claims.CLAIMS)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *overview.TABLES,
        *e2kd.TABLES,
        *frozen_features.TABLES,
        *ked.TABLES,
        *unicam.TABLES,
        *interpretability.TABLES,
        *benchmarks.TABLES,
        *training_length.TABLES,
        *source_files.TABLES,
        claims_e2kd,
        claims_ked,
        claims_unicam,
        claims_interpretability,
    )
}


def with_tables(page: str) -> str:
    """Return a page with its tables filled."""
    return MARK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n{found[4]}", page)


def pages() -> list[Path]:
    """Pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
