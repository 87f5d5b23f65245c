"""Fixture of the report's tests: a finished sweep, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sweeps import TWO_VARIANTS, run_sweep, sweep_arguments

SPLITS = ["test", "test_swapped"]


@pytest.fixture(scope="session")
def swept(frozen, tmp_path_factory) -> Path:
    """Folder in which a sweep of two variants with one seed has run, which tests must not change."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_sweep(sweep_arguments(frozen, TWO_VARIANTS, f"evaluate.splits=[{','.join(SPLITS)}]"))
    return folder
