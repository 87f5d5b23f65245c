"""Signals at random moments of all verbs: right exit codes and messages, whole files, identical bytes afterwards."""

from collections import Counter

import pytest

from tests.support.signals import VERBS, Row, signal_trials


def outcome_of(row: Row) -> str:
    """Name what a signal did, for the table."""
    if not (row.is_right and row.is_same):
        return "wrong"
    return f"ended with {row.exit_code}" if row.exit_code in (130, 143) else "had finished"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_signals_at_random_moments_end_every_verb_and_lose_nothing(tmp_path, count_trials):
    rows = list(signal_trials(40, 881, tmp_path))
    for verb in VERBS:
        of_verb = [row for row in rows if row.verb == verb]
        count_trials(verb, Counter(map(outcome_of, of_verb)))

    assert [row for row in rows if not (row.is_right and row.is_same)] == []
    assert any(row.exit_code == 143 for row in rows)
    assert any(row.exit_code == 130 for row in rows)
