"""Pages with generated tables, and the table of each name."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from docs.claims import e2kd as e2kd_claims
from docs.claims import interpretability as study_claims
from docs.claims import ked as ked_claims
from docs.claims import unicam as unicam_claims
from docs.claims.sections import claims_of, verdict_rows
from docs.links import PAGES
from docs.tables import (
    benchmarks,
    doors,
    e2kd,
    exchange,
    explainers,
    frontier,
    frozen_features,
    interpretability,
    ked,
    mixtures,
    overview,
    small_data,
    strong_views,
    training_length,
    unicam,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


PAPERS = {
    "e2kd": e2kd_claims.CLAIMS,
    "ked": ked_claims.CLAIMS,
    "unicam": unicam_claims.CLAIMS,
    "interpretability": study_claims.CLAIMS,
}
_STUDY = "interpretability"
VERDICTS: dict[str, tuple[str, ...]] = {
    "cells": (f"{_STUDY}/cells", f"{_STUDY}/cells_variants"),
    "shots": ("cifar10_fresh",),
    "other_claims": ("cifar10_equal_terms", "cifar10_vit", "cifar10_datafree"),
    "modes": ("cifar10_live", "cifar10_replay", "cifar10_bcos"),
    "guided": ("demo_guided",),
    "length": ("demo_converged", "ked/cifar10_length", f"{_STUDY}/cifar10_variants_length"),
    "study": (f"{_STUDY}/cifar10_variants",),
}
"""Experiments of pages of results whose tables say what the papers' pages decide."""

TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *overview.TABLES,
        *doors.TABLES,
        *e2kd.TABLES,
        *exchange.TABLES,
        *explainers.TABLES,
        *frozen_features.TABLES,
        *frontier.TABLES,
        *ked.TABLES,
        *unicam.TABLES,
        *interpretability.TABLES,
        *benchmarks.TABLES,
        *training_length.TABLES,
        *mixtures.TABLES,
        *strong_views.TABLES,
        *small_data.TABLES,
    )
}
TABLES |= {f"claims_{name}": partial(claims_of, claims) for name, claims in PAPERS.items()}
TABLES |= {f"verdicts_{name}": partial(verdict_rows, PAPERS, of) for name, of in VERDICTS.items()}


def with_tables(page: str) -> str:
    """Return a page with its tables filled, between empty lines unless a table begins right after its mark.

    Raises ValueError if a table has a header alone.
    """

    def fill(mark: re.Match[str]) -> str:
        line = "" if mark[3].startswith("|") else "\n"
        text = TABLES[mark[2]]()
        if re.search(r"\n\|(?:---\|)+\n(?!\|)", text):
            raise ValueError(f"table {mark[2]} is empty: no committed result has a row of it")
        return f"{mark[1]}{line}{text}{line}{mark[4]}"

    return MARK.sub(fill, page)


def pages() -> list[Path]:
    """Pages that may have tables, and files of details next to the experiments."""
    return PAGES
