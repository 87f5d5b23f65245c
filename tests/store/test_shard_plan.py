"""Assignment of records to shards: seeded, class-mixed and independent of the source's order."""

import random

import pytest

from permafrost.core.errors import ConfigError
from permafrost.core.records import Record
from tests.support.listings import plan_records


def planned_records(count, split="train", labels=10):
    return [
        Record(key=f"{split}{i:04d}", split=split, label=i * labels // count) for i in range(count)
    ]


def names_and_keys(plans):
    return [(plan.name, [record.key for record in plan.records]) for plan in plans]


def test_every_record_is_in_exactly_one_shard_of_its_split():
    plans = plan_records(
        planned_records(103) + planned_records(17, split="test"), shard_size=20, seed=0
    )

    assert [plan.name for plan in plans] == ["test-000000", *(f"train-{i:06d}" for i in range(6))]
    assert [plan.position for plan in plans] == list(range(7))
    assert [len(plan.records) for plan in plans] == [17, 20, 20, 20, 20, 20, 3]
    keys = [record.key for plan in plans for record in plan.records]
    assert sorted(keys) == sorted(
        r.key for r in planned_records(103) + planned_records(17, split="test")
    )
    assert all(record.split == plan.split for plan in plans for record in plan.records)


def test_the_plan_does_not_depend_on_the_order_of_the_source():
    listed = planned_records(100)
    shuffled = random.Random(1).sample(listed, len(listed))

    assert names_and_keys(plan_records(listed, 16, 3)) == names_and_keys(
        plan_records(shuffled, 16, 3)
    )


def test_another_seed_gives_another_plan():
    assert names_and_keys(plan_records(planned_records(100), 16, 0)) != names_and_keys(
        plan_records(planned_records(100), 16, 1)
    )


def test_a_class_sorted_source_gives_mixed_shards():
    plans = plan_records(planned_records(1000), shard_size=100, seed=0)

    # With 100 draws from 10 equal classes, a shard with fewer than 8 classes is practically impossible.
    assert all(len({record.label for record in plan.records}) >= 8 for plan in plans)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\\b", "x" * 201, "\u00e9" * 101])
def test_a_key_that_no_tar_could_hold_is_refused(key):
    with pytest.raises(ConfigError, match="record key"):
        plan_records([Record(key=key, split="train")], 10, 0)


def test_a_key_used_twice_is_refused_even_across_splits():
    with pytest.raises(ConfigError, match="'same'"):
        plan_records([Record(key="same", split="a"), Record(key="same", split="b")], 10, 0)


def test_an_empty_source_is_refused():
    with pytest.raises(ConfigError, match="no records"):
        plan_records([], 10, 0)
