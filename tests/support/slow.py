"""Parameters of tests of which `make test` runs some, and `make test-all` all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Mark the cases that are not among `kept` as slow, in their order."""
    cases = list(cases)
    assert all(case in cases for case in kept)
    return [case if case in kept else slow(case) for case in cases]


def slow(*values: Any, **options: Any) -> Any:
    """Return a case of a parametrized test that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
