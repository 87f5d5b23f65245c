"""Schedules of the learning rate."""

import math

import pytest

from permafrost.config.training import TrainerOptions
from permafrost.core.errors import ConfigError
from permafrost.training.optim import check_warmup, learning_rate


def test_learning_rate_warms_up_from_a_hundredth_and_ends_at_zero():
    trainer = TrainerOptions(epochs=30, warmup_epochs=5)

    rates = [learning_rate(trainer, 0.2, epoch) for epoch in range(31)]

    assert rates[0] == pytest.approx(0.01 * 0.2, rel=0, abs=1e-9)
    assert rates[5] == pytest.approx(0.2, rel=0, abs=1e-9)
    assert rates[30] == pytest.approx(0.0, rel=0, abs=1e-9)
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_learning_rate_is_linear_in_the_warm_up_and_a_cosine_after_it():
    trainer = TrainerOptions(epochs=25, warmup_epochs=5)

    assert learning_rate(trainer, 1.0, 2) == pytest.approx(0.01 + 0.99 * 2 / 5, rel=0, abs=1e-9)
    assert learning_rate(trainer, 1.0, 10) == pytest.approx(
        0.5 * (1 + math.sqrt(0.5)), rel=0, abs=1e-9
    )
    assert learning_rate(trainer, 1.0, 15) == pytest.approx(0.5, rel=0, abs=1e-9)


def test_constant_learning_rate_stays_after_the_warm_up():
    warmed = TrainerOptions(epochs=10, warmup_epochs=2, schedule="constant")
    unwarmed = TrainerOptions(epochs=3, schedule="constant")

    assert [learning_rate(warmed, 0.2, epoch) for epoch in range(2, 11)] == [0.2] * 9
    assert learning_rate(warmed, 0.2, 0) == pytest.approx(0.002, rel=0, abs=1e-9)
    assert [learning_rate(unwarmed, 0.2, epoch) for epoch in range(3)] == [0.2] * 3


def test_a_warm_up_in_steps_moves_in_every_step_and_ends_at_zero():
    vit = TrainerOptions(epochs=150, warmup_steps=10_000)
    rate = {
        at: learning_rate(vit, 1e-3, *divmod(at, 4_810), num_steps=4_810)
        for at in (0, 1, 9_999, 10_000, 10_001, 150 * 4_810 - 1)
    }

    assert rate[0] == pytest.approx(1e-5, rel=0, abs=1e-9)
    assert 0 < rate[1] - rate[0] < 1e-6
    assert rate[9_999] < rate[10_000]
    assert rate[10_000] == pytest.approx(1e-3, rel=0, abs=1e-9)
    assert rate[10_001] < rate[10_000]
    assert rate[150 * 4_810 - 1] == pytest.approx(0, rel=0, abs=1e-9)


def test_a_decay_takes_a_tenth_every_thirty_epochs():
    sgd = TrainerOptions(epochs=100, schedule="decay")

    rates = [learning_rate(sgd, 0.1, epoch, step=3, num_steps=7) for epoch in range(100)]

    assert rates[29] == 0.1
    assert rates[30] == pytest.approx(0.01)
    assert rates[60:90] == pytest.approx([0.001] * 30)


def test_a_warm_up_that_never_ends_is_refused():
    config = TrainerOptions(epochs=2, warmup_steps=20)

    check_warmup(config, num_steps=11)
    with pytest.raises(ConfigError, match=r"warmup_steps=20 does not end within the 20 steps"):
        check_warmup(config, num_steps=10)


def test_two_kinds_of_warm_up_are_refused():
    with pytest.raises(ConfigError, match="replaces"):
        TrainerOptions(epochs=10, warmup_steps=5, warmup_epochs=1)
