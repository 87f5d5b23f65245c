"""A tiny demo set, a store of it and a tiny teacher: real ones, made once per test run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.cluster import LocalClusterConfig
from pipeline.config.data import DemoDataConfig
from pipeline.config.explainers import GradCamConfig
from pipeline.config.models import CifarModelConfig, NoModelConfig
from pipeline.config.store import PassOptions, StoreOptions
from pipeline.config.verbs import PrecomputeConfig
from pipeline.models.providers import build_model
from pipeline.store.frames import FrameBatch, ShardFrames
from pipeline.store.reader import Store
from stages import precompute

torch.set_num_threads(1)

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
    """A store with one teacher pass, and the config that made it."""

    store: Store
    config: PrecomputeConfig


@pytest.fixture(autouse=True)
def own_runs_folder(tmp_path, monkeypatch):
    """Runs land in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> CifarModelConfig:
    """A ResNet-8 of width 4 for ten classes, with random weights in a file."""
    config = CifarModelConfig(name="resnet8", width=4)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(build_model(config, 10).state_dict(), path)
    return replace(config, weights=str(path))


def precompute_config(store: Path, teacher=None, **options) -> PrecomputeConfig:
    """A serial precompute of the tiny set: 72 records in shards of 16."""
    store_options = {
        name: options.pop(name)
        for name in ("backend", "shard_size", "image_size", "format", "path")
        if name in options
    }
    return PrecomputeConfig(
        data=options.pop("data", TINY_DATA),
        store=StoreOptions(path=str(store), **{"shard_size": 16, **store_options}),
        teacher=teacher or NoModelConfig(),
        **{
            "explainer": GradCamConfig(),
            "annotate": PassOptions(batch_size=8),
            "cluster": LocalClusterConfig(),
            "executor": "serial",
            **options,
        },
    )


def frame_batches(store: Store, shard, batch_size: int = 64) -> list[FrameBatch]:
    """A shard's frames in batches."""
    frames = ShardFrames(store, shard)
    starts = range(0, shard.records, batch_size)
    return [frames.read(start, min(start + batch_size, shard.records)) for start in starts]


@pytest.fixture(scope="session")
def frozen(tmp_path_factory, tiny_teacher) -> Frozen:
    """A finished store with one Zarr pass; read only."""
    config = precompute_config(tmp_path_factory.mktemp("frozen") / "store", tiny_teacher)
    precompute.run(config)
    return Frozen(Store(Path(config.store.path)), config)
