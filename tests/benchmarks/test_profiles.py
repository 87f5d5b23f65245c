"""Arithmetic of profiles and of trainings beside other processes."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.benchmarks import busy, profiles
from tests.benchmarks.busy import BusyTraining
from tests.benchmarks.profiles import Profile, Stopwatch, profile
from tests.support.items import for_each


class Work:
    def outer(self):
        time.sleep(0.02)
        self.inner()
        self.inner()

    def inner(self):
        time.sleep(0.03)


def test_the_time_of_a_part_excludes_the_parts_it_calls(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 7.0])  # start, outer, inner, end of inner, end of outer
    monkeypatch.setattr(profiles.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()

    with watch.part("outer"), watch.part("inner"):
        pass

    assert watch.seconds == {"outer": 2.0 + 1.0, "inner": 3.0}


def test_a_profile_covers_the_whole_call_and_leaves_nothing_patched():
    place = f"{__name__}:Work"
    original = Work.inner

    found = profile(
        "work", lambda: Work().outer(), [(place, "outer", "out"), (place, "inner", "in")]
    )

    assert list(found.parts) == ["in", "out"]
    assert found.parts["in"] >= 0.06
    assert 0.02 <= found.parts["out"] < 0.06
    assert 0 <= found.rest < 0.01
    assert Work.inner is original


def test_calls_on_other_threads_are_not_counted():
    def command():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(Work().inner).result()

    place = f"{__name__}:Work"

    recorded = profile("work", command, [(place, "inner", "in")])

    assert recorded.parts == {}
    assert recorded.rest >= 0.03


def test_a_part_that_does_not_exist_is_an_error():
    with ExitStack() as stack, pytest.raises(AttributeError):
        Stopwatch().watch(stack, [(f"{__name__}:Work", "missing", "")])


@for_each("part", sorted({*profiles.STEP, *profiles.PRECOMPUTE, *profiles.PACK}))
def test_the_parts_of_the_commands_exist(part):
    with ExitStack() as stack:
        Stopwatch().watch(stack, [part])


def test_shares_of_a_profile_add_up():
    text = profiles.markdown([Profile("step", 2.0, {"forward": 1.5})])

    assert "| | forward | 1.50 | 75 |" in text
    assert "| | the rest | 0.50 | 25 |" in text


@pytest.mark.parametrize(("threads", "limit"), [(1, 1.5 * 3 / 2), (2, 3.0)])
def test_the_aim_is_the_fair_share_of_the_cores(threads, limit):
    one = BusyTraining(
        waiting="", threads=threads, cores=2, alone=1.0, beside_one=1.0, beside_two=limit
    )

    assert one.limit == limit
    assert f"**{limit:.2f}**" in busy.markdown([one])
