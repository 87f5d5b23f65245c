"""The gate of shards: which one is blamed for a death, and a pass on which nobody works any more."""

import asyncio

import pytest
import ray

from permafrost.cluster import shard_rows
from permafrost.cluster.shard_rows import Gate


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "host", "Alive": True}])
    return Gate(most_deaths=5, actors=2)


async def begun(gate, row, actor):
    """Give a row its shard, which the actor begins."""
    assignment = await gate.take(row, actor)
    await gate.begin(assignment.number, f"shard-{assignment.number}", actor, "host")
    return assignment


def test_of_two_shards_of_a_dead_process_none_is_blamed_and_each_is_done_alone(gate):
    async def play():
        await gate.add(1, b"", [b"", b"", b""])
        for row, actor in enumerate("abb"):
            await begun(gate, row, actor)
        both = [await begun(gate, row, actor) for row, actor in ((1, "b"), (2, "a"))]
        again = [await begun(gate, row, "b") for row in (1, 1)]
        return both, again, await begun(gate, 0, "a")

    both, again, other = asyncio.run(play())

    assert [(each.deaths, each.is_alone) for each in both] == [(0, True)] * 2
    assert [(each.deaths, each.is_alone) for each in again] == [(1, True), (2, True)]
    assert (other.deaths, other.is_alone) == (0, True)  # its actor had been given another one, too


def test_a_pass_whose_actors_are_between_shards_without_end_names_what_is_left(gate, monkeypatch):
    monkeypatch.setattr(shard_rows, "_UNIT_SECONDS", 3)

    async def play(shard, is_writing=False):
        await gate.add(1, b"", [b"", b""])
        await begun(gate, 0, "a")
        ends = []
        for _ in range(5):
            await gate.report("a", [], "host", shard, 1, is_writing)
            ends.append((await gate.take_silent())[3])
        return ends

    assert asyncio.run(play("shard-0")) == [[]] * 5
    assert asyncio.run(play("", is_writing=True)) == [[]] * 5  # a large upload may take longer
    names = ["shard-0", *(f"number {number}" for number in range(1, 6))]
    assert asyncio.run(play("")) == [[]] * 3 + [names] * 2
