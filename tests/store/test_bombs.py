"""Small files that claim to be enormous: one line, and no more memory than a sound store takes."""

import pytest

from tests.support.bombs import BOMBS, explode, read_sound
from tests.support.slow import slow

_MEGABYTES = 200
"""Memory that a refusal may take above that of a sound store."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory, frozen):
    read_sound(frozen.store.path, tmp_path_factory.mktemp("sound"))
    return frozen.store.path


@pytest.mark.parametrize(
    "bomb", [(slow if bomb.takes_seconds else pytest.param)(bomb, id=bomb.name) for bomb in BOMBS]
)
def test_a_bomb_is_refused_before_it_takes_memory(bomb, sound, tmp_path, count_trials):
    outcome = explode(bomb, sound, tmp_path)
    count_trials(bomb.name, {"refused": 1}, outcome.seconds, outcome.megabytes)

    assert bomb.message in outcome.error
    assert "\n" not in outcome.error
    assert outcome.megabytes < _MEGABYTES
