"""Small stores of every kind, and all values that are read from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from permafrost.config.augment import (
    AugmentOptions,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
    RandomViewsConfig,
)
from permafrost.config.store import PassOptions
from permafrost.loading.dataset import StoreDataset, iter_batches
from permafrost.loading.geometry import view_images
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store
from permafrost_sources.demo import DemoSource
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.images import write_tar
from tests.support.stores import TINY_DATA, precompute_config
from tests.support.verbs import precompute

EVERY_OUTPUT = PassOptions(
    batch_size=8, outputs=("logits", "maps", "attention", "class_maps", "pooled")
)


INTERMEDIATES = ("attention", "class_maps", "pooled")


def write_tars(folder: Path) -> WebDatasetDataConfig:
    """Write the tiny set as two tars of 36 records each, which a store can reference."""
    source = DemoSource(TINY_DATA)
    records = list(source.records())
    for number in range(2):
        members = {}
        for record in records[number::2]:
            content = source.read(record)
            members[f"{record.key}.{content.suffix}"] = content.image
            members |= {
                f"{record.key}.cls": str(record.label),
                f"{record.key}.mask.png": content.mask,
            }
        write_tar(folder / f"train-{number:06d}.tar", members)
    return WebDatasetDataConfig(path=str(folder), reference="always")


def build_store(kind: str, folder: Path, teacher) -> Path:
    """Write a store of that kind with a canonical pass to folder/store, next to the files that it references."""
    config = precompute_config(folder / "store", teacher, annotate=EVERY_OUTPUT)
    if kind in ("jpeg95", "raw"):
        config = replace(config, store=replace(config.store, format=kind))
    if kind == "webdataset":
        config = replace(config, store=replace(config.store, backend="webdataset"))
    if kind == "stored views":
        views = RandomViewsConfig(count=2)
        config = replace(
            config,
            views=views,
            augment=AugmentOptions(
                operations=(
                    OperationConfig(kind="horizontal_flip"),
                    PolicyConfig(kind="randaugment"),
                    PixelOperationConfig(kind="random_erasing"),
                )
            ),
        )
    if kind == "referenced tars":
        config = replace(
            config, data=write_tars(folder / "tars"), store=replace(config.store, shard_size=None)
        )
    precompute.run(config)
    return folder / "store"


def read_everything(path: Path, kind: str = "zarr") -> list[torch.Tensor]:
    """All tensors that training or evaluation reads from a store, as a flat list."""
    read: list[torch.Tensor] = []
    store = Store(path)
    for stored_views in (False, True):
        if stored_views and "views" not in kind:
            continue
        passes = store.open_passes(stored_views=stored_views)
        every = np.arange(store.index.num_rows)
        rows = np.asarray(rows_of_split(store.index, "train")) if stored_views else every
        for output_name in INTERMEDIATES:
            dataset = StoreDataset(store, rows, passes, with_regions=True, output=output_name)
            if stored_views:
                positions = [(at, at % 2) for at in range(len(rows))]
                batches = [dataset.__getitems__(positions)]
            else:
                batches = list(iter_batches(dataset, 24))
            for batch in batches:
                (targets,) = batch.targets
                read += [batch.inputs, batch.labels, batch.groups, batch.masks, *batch.boxes]
                read += [targets.logits, targets.maps, targets.target_class]
                read += [targets.intermediates[name] for name in sorted(targets.intermediates)]
                if batch.canonical_from_view is not None:
                    read += [batch.canonical_from_view, view_images(batch, store.size)]
    return read


def equal_tensors(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )
