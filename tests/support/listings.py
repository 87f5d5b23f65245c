"""Listings and plans of records, in the test's own folder."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path

from permafrost.core.tasks import SerialExecutor
from permafrost.sources.source import ListedData, list_source, tally_of
from permafrost.store.listing import Listing, ListingFiles, write_listing
from permafrost.store.pack import fingerprint_dataset
from permafrost.store.shard_plan import plan_shards


def listing_paths() -> ListingFiles:
    return ListingFiles(Path.cwd(), secrets.token_hex(8))


def list_records(records, seed=0) -> Listing:
    files = listing_paths()
    write_listing(files.records, records, seed)
    return Listing(files.records)


def plan_records(records, shard_size, seed):
    return plan_shards(list_records(records, seed), shard_size)


def list_parts(source, store_options) -> Listing:
    return list_source(source, listing_paths(), store_options.seed, SerialExecutor())[0]


def plan_whole(source, store_options):
    listed = ListedData(source, list_parts(source, store_options), tally_of(source))
    return listed.plan_shards(store_options)


def fingerprint_records(config, revision, records):
    return fingerprint_dataset(config, revision, list_records(records))


def listed_values(record):
    """Values of a record that are part of the fingerprint of the data."""
    values = asdict(record)
    del values["position"]  # a column of its own
    return {name: value for name, value in values.items() if (name, value) != ("weight", None)}
