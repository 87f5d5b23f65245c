"""Tests that need the packages of the papers, which permafrost itself does not."""

from importlib.util import find_spec

import pytest

HAS_PAPERS = find_spec("permafrost_papers") is not None
needs_papers = pytest.mark.skipif(
    not HAS_PAPERS, reason="the packages of permafrost_papers are not here"
)
