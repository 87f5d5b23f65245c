"""Fixtures of the evaluators."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from permafrost.store.reader import Store
from tests.support.runs import save_student


@pytest.fixture
def own(frozen, tmp_path):
    """Writable copy of the frozen store with two untrained students."""
    store = shutil.copytree(frozen.store.path, tmp_path / "store")
    copied = replace(frozen, store=Store(store))
    save_student(copied, "one")
    save_student(copied, "two", seed=6)
    return copied
