"""Signals that end a command, also where other code swallows the exception of the handler."""

import ctypes
import os
import signal
import sys
import threading

import pytest

from permafrost import cli
from permafrost.core import interrupts
from permafrost.core.errors import ConfigError
from permafrost.core.interrupts import Interrupted, catch_signals, check_interrupted, keep_signals
from permafrost.training import loop
from tests.support.runs import distill_config
from tests.support.verbs import distill

ENDS = pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)


@pytest.fixture(autouse=True)
def own_handler():
    """Handle Ctrl-C, which a shell has the processes ignore that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def swallow(number):
    """Send a signal to this process where no exception can leave, as in functions of pyarrow."""
    os.kill(os.getpid(), number)
    for _ in range(1000):  # the handler runs between two instructions of the stage_main thread
        pass


def end_of(run, capsys, monkeypatch):
    """Exit code and standard error of a command that calls `run`."""
    monkeypatch.setattr(sys, "argv", ["permafrost verify"])
    monkeypatch.setattr(cli, "_run_typed", lambda verb, words: run())
    with pytest.raises(SystemExit) as end:
        cli.stage_main("verify")
    return end.value.code, capsys.readouterr().err


def fail_after(number):
    swallow(number)
    raise AttributeError("partially initialized module")


def complain_after(number):
    swallow(number)
    raise ConfigError("a wrong option")


@ENDS
@pytest.mark.parametrize("then", [swallow, fail_after, complain_after])
def test_a_swallowed_signal_ends_a_command_as_any_other(
    number, code, how, then, capsys, monkeypatch
):
    found, errors = end_of(lambda: then(number), capsys, monkeypatch)

    assert (found, errors) == (
        code,
        f"permafrost verify: {how}; the same command resumes where it stopped\n",
    )


@ENDS
def test_a_signal_ends_a_command_at_once(number, code, how, capsys, monkeypatch):
    def wait():
        os.kill(os.getpid(), number)
        threading.Event().wait()

    assert end_of(wait, capsys, monkeypatch)[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_ends_at_the_step_after_a_swallowed_signal(frozen, number, monkeypatch):
    steps, step = [], loop.train_step

    def train_step(*arguments, **options):
        steps.append(len(steps))
        if len(steps) == 3:
            swallow(number)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(Interrupted), catch_signals() as signals, signals.raising():
        distill.run(distill_config(frozen))

    assert len(steps) == 3
    assert signals.received == [number]


def test_a_signal_in_a_block_that_keeps_it_is_raised_at_its_end():
    done = []

    def work():
        with keep_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("block")
        done.append("after")

    with catch_signals() as signals, pytest.raises(Interrupted), signals.raising():
        work()

    assert done == ["block"]


def test_outside_of_commands_nothing_is_kept_and_the_handlers_are_the_old_ones():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with catch_signals():
        swallow(signal.SIGTERM)
        with pytest.raises(Interrupted):
            check_interrupted()

    check_interrupted()
    assert interrupts._current.received == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as signals, signals.raising():
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
