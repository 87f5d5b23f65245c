"""Small files that claim to be enormous: one line, and no more memory than a sound store takes."""

import pytest

from tests.support.bombs import BOMBS, explode_all

_MEGABYTES = 200
"""Memory that a refusal may take above that of a sound store."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, frozen):
    """Outcome of every bomb, by name."""
    found = explode_all(frozen.store.path, tmp_path_factory.mktemp("bombs"))
    return {outcome.name: outcome for outcome in found}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.name)
def test_a_bomb_is_refused_before_it_takes_memory(bomb, outcomes, count_trials):
    outcome = outcomes[bomb.name]
    count_trials(bomb.name, {"refused": 1}, outcome.seconds, outcome.megabytes)

    assert bomb.message in outcome.error
    assert "\n" not in outcome.error
    assert outcome.megabytes < _MEGABYTES
