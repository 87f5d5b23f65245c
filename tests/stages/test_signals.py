"""Signals at random moments of all verbs: right exit codes and messages, whole files, identical bytes afterwards."""

import pytest

from tests.support.signals import signal_trials


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_signals_at_random_moments_end_every_verb_and_lose_nothing(tmp_path):
    rows = list(signal_trials(40, 881, tmp_path))

    assert [row for row in rows if not (row.is_right and row.is_same)] == []
    assert any(row.exit_code == 143 for row in rows)
    assert any(row.exit_code == 130 for row in rows)
