"""Small stores: configurations, a finished store, and helpers to read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.explainers import GradCamConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig, StoreOptions
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.subset import rows_of_split
from permafrost.store.fields import StoredShard
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.reader import Store
from permafrost_sources.options import DemoDataConfig
from tests.support.index_table import index_table
from tests.support.verbs import precompute

TINY_DATA = DemoDataConfig(
    image_size=16,
    min_digit_size=8,
    max_digit_size=12,
    test_digits=10,
    train_digits=40,
    teacher_digits=12,
    teacher_placements=1,
    test_placements=1,
)


@dataclass(frozen=True)
class Frozen:
    """Store with one teacher pass, and the config that made it."""

    store: Store
    config: PrecomputeConfig


def precompute_config(store: Path, teacher=None, **options) -> PrecomputeConfig:
    """Options of a serial precompute of the tiny set: 72 records in shards of 16; tars are used in place."""
    store_options = {
        name: options.pop(name)
        for name in ("backend", "shard_size", "image_size", "format", "path")
        if name in options
    }
    data = options.pop("data", TINY_DATA)
    shard_size = None if getattr(data, "reference", "never") in ("auto", "always") else 16
    return PrecomputeConfig(
        data=data,
        store=StoreOptions(path=str(store), **{"shard_size": shard_size, **store_options}),
        teacher=teacher or NoModelConfig(),
        **{
            "explainer": GradCamConfig(),
            "annotate": PassOptions(batch_size=8),
            "cluster": LocalClusterConfig(),
            "executor": "serial",
            "run": "frozen",
            **options,
        },
    )


def frozen_store(path: Path, teacher=None, **options) -> Frozen:
    """Precompute a store of the tiny set with these options."""
    config = precompute_config(path, teacher, **options)
    precompute.run(config)
    return Frozen(Store(path), config)


def frame_batches(store: Store, shard, batch_size: int = 64) -> list[FrameBatch]:
    """Frames of a shard in batches."""
    frames = ShardFrames(store, shard)
    starts = range(0, shard.records, batch_size)
    return [frames.read(start, min(start + batch_size, shard.records)) for start in starts]


def stored_shard(position, name, keys, written):
    """Shard as described by the manifest and the commit marker of a pass."""
    return StoredShard(
        position=position,
        name=name,
        keys=keys,
        files={entry.path: entry for entry in written.files},
        chunk_crc32c=np.array(written.chunk_crc32c, np.uint32).reshape(len(keys), -1),
    )


def train_dataset(frozen, output_name="pooled", **options):
    store = frozen.store
    passes = store.open_passes(**options)
    return StoreDataset(store, rows_of_split(store.index, "train"), passes, output=output_name)


def table_of_shard(store, shard):
    """Rows of the index of one shard, as an Arrow table."""
    here = store.rows_of_shard(store.shards.number_of(shard.name))
    return index_table(store).slice(here.start, len(here))


def keys_of_shard(store, shard):
    """Keys of one shard."""
    return store.index.shard_keys(store.shards.number_of(shard.name))
