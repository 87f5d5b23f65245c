"""Listings and plans of shards: seeded, class-mixed, equal to those that hold all records, and no file is left."""

import errno
import hashlib
import io
import json
import os
import pickle
import random
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from permafrost.core.digests import canonical_json, sha256_keys
from permafrost.core.errors import ConfigError
from permafrost.core.records import Box, Record
from permafrost.storage.files import file_at
from permafrost.storage.local_files import LocalFile, NoSpaceError
from permafrost.storage.lock import LockedError
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store import listing, shard_plan
from permafrost.store.index_writer import IndexWriter
from permafrost.store.listing import (
    join_listings,
    listing_files,
    parse_record,
    record_json,
    write_listing,
)
from permafrost_sources.options import DemoDataConfig
from tests.support.listings import (
    fingerprint_records,
    list_records,
    listed_values,
    listing_paths,
    plan_records,
)

LETTERS = "abz019-_%~ \u00e9\u0100\u65e5\uffee\U0001d11e"
"""Characters of 1 to 4 bytes, whose order in UTF-16 is not that of their code points."""


def random_records(count, seed=0):
    generator = random.Random(seed)
    keys = set()
    while len(keys) < count:
        keys.add("".join(generator.choices(LETTERS, k=generator.randint(1, 12))))
    return [random_record(key, generator) for key in generator.sample(sorted(keys), count)]


def random_record(key, generator):
    box = Box(label=generator.randrange(9), x0=-generator.random(), y0=0, x1=1e-7, y1=0.1)
    return Record(
        key=key,
        split=generator.choice(["train", "test", "val_2", "Z"]),
        label=generator.randint(-1, 40),
        labels=tuple(generator.sample(range(60), generator.randint(0, 3))),
        group=generator.randint(-1, 2**31 - 1),
        weight=generator.choice([None, 0.0, 2.5]),
        boxes=(box,) * generator.randint(0, 2),
        boxes_in_pixels=generator.random() < 0.5,
        content=generator.choice(
            [
                (),
                ('a/\u65e5 "quoted".jpg', 12, None, True),
                ("t.tar", "png", (512, 2**40), ()),
                ({"b": (1, (2.5, "x")), "a": None}, 1 / 3),
            ]
        ),
    )


def plain_plan(records, shard_size, seed):
    """Names, splits and records of the shards, from all records in memory."""
    ranked = sorted(records, key=lambda record: listing.rank_of(record.key, seed))
    by_split = groupby(sorted(ranked, key=lambda r: r.split), key=lambda r: r.split)
    shards = []
    for split, members in by_split:
        members = list(members)
        for number, start in enumerate(range(0, len(members), shard_size)):
            chunk = tuple(members[start : start + shard_size])
            shards.append((f"{split}-{number:06d}", split, chunk))
    return shards


def plain_fingerprint(config, revision, records):
    listed = [listed_values(record) for record in sorted(records, key=lambda record: record.key)]
    whole = {"data": config.description, "records": listed, "revision": revision}
    return hashlib.sha256(
        json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def assert_planned_as_in_memory(records, shard_size, seed):
    plans = pickle.loads(pickle.dumps(plan_records(iter(records), shard_size, seed)))  # noqa: S301

    expected = plain_plan(records, shard_size, seed)
    assert [(plan.name, plan.split, plan.records) for plan in plans] == expected
    assert [plan.position for plan in plans] == list(range(len(expected)))
    for plan, (_, _, members) in zip(plans, expected, strict=True):
        assert plan.num_records == len(members)
        assert plan.keys == [record.key for record in members]
        assert plan.keys_sha256 == sha256_keys([record.key for record in members])
        assert plan.labels.tolist() == [record.label for record in members]


@pytest.fixture
def small_blocks(monkeypatch):
    """Work on a few records at once, so that every boundary is crossed."""
    monkeypatch.setattr(listing, "BATCH_RECORDS", 7)
    monkeypatch.setattr(listing, "_JOINED_RECORDS", 3)
    monkeypatch.setattr(shard_plan, "_BLOCK", 5)


def test_plans_and_fingerprints_are_those_of_the_records_in_memory(small_blocks):
    records = random_records(500)

    for shard_size, seed in ((16, 0), (1, 3), (1000, 2**63 - 1)):
        assert_planned_as_in_memory(records, shard_size, seed)
    config = DemoDataConfig(seed=4)
    expected = plain_fingerprint(config, 2, records)
    assert fingerprint_records(config, 2, records) == expected
    assert fingerprint_records(config, 2, random.Random(1).sample(records, 500)) == expected
    assert fingerprint_records(config, 2, records[1:]) != expected


def test_a_batch_ends_when_its_records_are_large(monkeypatch):
    monkeypatch.setattr(listing, "BATCH_BYTES", 400)
    records = random_records(50)

    assert len(list_records(records).batches) > 5
    assert_planned_as_in_memory(records, 16, 0)


@pytest.mark.parametrize("low_bytes", [8, 1, 0])
def test_equal_ranks_are_settled_by_the_whole_hash_and_then_by_the_source(
    monkeypatch, small_blocks, low_bytes
):
    def rank_of(key, seed):
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        return bytes([digest[0] % 3]) + bytes(7) + digest[:low_bytes] + bytes(8 - low_bytes)

    monkeypatch.setattr(listing, "rank_of", rank_of)

    assert_planned_as_in_memory(random_records(200), 16, 0)


@pytest.mark.parametrize("splits", [("a", "a"), ("a", "b")])
def test_keys_that_come_twice_are_named_and_counted(splits, small_blocks):
    records = random_records(100)
    twice = [Record(key=key, split=split) for key in ("zwei", "eins") for split in splits]

    with pytest.raises(
        shard_plan.RepeatedKeyError, match="records 53 and 54 have the key 'eins'"
    ) as error:
        plan_records([*records[:50], *twice, *records[50:], twice[-1]], 16, 0)
    assert (error.value.row, error.value.count) == (53, 2)


def test_a_record_survives_its_text():
    for record in random_records(50, seed=7):
        assert record_json(record) == canonical_json(listed_values(record))
        assert parse_record(record_json(record)) == record
    assert parse_record(record_json(Record(key="k", split="s", content=([1, [2]],)))).content == (
        (1, (2,)),
    )


def test_parts_are_joined_in_their_order(small_blocks):
    records = random_records(60)
    files = listing_paths()
    parts = [records[:3], [], records[3:41], records[41:]]
    for number, part in enumerate(parts):
        write_listing(files.part(number), part, seed=0)

    joined = join_listings((files.part(number) for number in range(len(parts))), files.records)

    assert joined.part_sizes == (3, 0, 38, 19)
    assert joined.records(np.arange(60)) == tuple(records)
    assert joined.largest_label == max(max(r.label, *r.labels, -1) for r in records)
    assert max(batch.num_rows for batch in joined.batches[:-1]) >= 7
    assert not files.part(0).exists()


def test_the_files_of_a_listing_are_gone_after_an_error_and_those_of_a_killed_run_before(tmp_path):
    (tmp_path / ".listing.0123.order.partial").write_bytes(b"left by a killed run")

    def break_off():
        yield Record(key="a", split="train")
        raise ConfigError("the table is damaged")

    def list_all():
        with listing_files(tmp_path) as files:
            assert list(tmp_path.iterdir()) == []
            write_listing(files.part(0), [Record(key="b", split="train")], 0)
            assert [path.name[-8:] for path in tmp_path.iterdir()] == [".partial"]
            write_listing(files.records, break_off(), 0)

    with pytest.raises(ConfigError, match="damaged"):
        list_all()

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_read_only_is_listed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, dir_fd: False)

    with listing_files(tmp_path) as files:
        write_listing(files.records, [Record(key="b", split="train")], 0)
        assert list(tmp_path.iterdir()) == []
    assert not file_at(files.folder).exists()


def test_a_listing_that_another_writer_has_removed_is_one_line(tmp_path):
    with listing_files(RootedPath(tmp_path)) as ours:
        write_listing(ours.records, [Record(key="a", split="train")], 0)
        (plan,) = shard_plan.plan_shards(listing.Listing(ours.records), 8)
        with listing_files(RootedPath(tmp_path)):  # of a writer that holds a lock of its own
            for read in (lambda: listing.Listing(ours.records), lambda: plan.keys):
                with pytest.raises(LockedError, match="removed by another process that writes to"):
                    read()


def test_a_full_disk_is_named_and_an_error_of_the_source_is_not_mistaken_for_it(
    tmp_path, monkeypatch
):
    def unreadable():
        yield Record(key="b", split="train")
        raise OSError(errno.ENOSPC, "of the source")

    with pytest.raises(OSError, match="of the source") as raised:
        write_listing(tmp_path / "l", unreadable(), 0)
    assert type(raised.value) is OSError

    class FullFile:
        def write_batch(self, batch):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(listing.pa.ipc, "new_file", lambda *_: FullFile())
    with pytest.raises(NoSpaceError, match=r"no room to write .*/l \(No space left"):
        write_listing(tmp_path / "l", [Record(key="b", split="train")], 0)


def test_a_full_disk_is_named_by_the_index_too(tmp_path, monkeypatch):
    full = Path("/dev/full")
    monkeypatch.setattr(LocalFile, "scratch", lambda _: io.BufferedWriter(io.FileIO(full, "w")))

    def write():
        with IndexWriter(RootedPath(tmp_path)) as writer:
            writer.finish()

    reason = os.strerror(errno.ENOSPC)
    with pytest.raises(
        NoSpaceError, match=rf"no room to write .*/index/boxes_offsets\.npy \({reason}"
    ):
        write()


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
