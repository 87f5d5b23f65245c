"""Tests leave the checkout as it is, and their processes share nothing."""

from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def folder_of_a_session():
    """Working folder of session fixtures, where stages write runs/."""
    return Path.cwd()


@pytest.fixture(scope="module")
def folder_of_a_module():
    """Working folder of module fixtures."""
    return Path.cwd()


def test_fixtures_and_tests_work_outside_the_checkout(
    folder_of_a_session, folder_of_a_module, frozen, tmp_path
):
    for folder in (folder_of_a_session, folder_of_a_module, Path.cwd()):
        assert not folder.is_relative_to(ROOT)
    assert Path.cwd() == tmp_path
    # Stages write their runs there, as the store of all tests shows.
    assert list(folder_of_a_session.glob(f"runs/{frozen.config.run}/precompute/cost.json"))
