"""The stores, passes and batches that rows share."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from permafrost.config.augment import AugmentOptions, OperationConfig
from permafrost.config.models import ModelConfig
from permafrost.core.batches import Batch
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.models.providers import build_model
from permafrost.store.reader import Store
from tests.gpu.inputs import pack, pass_named, precompute_config, write_images
from tests.gpu.scale import CLASSES, Scale
from tests.support.images import decode_frame
from tests.support.verbs import precompute

VIEWS = AugmentOptions(
    operations=(OperationConfig(kind="resized_crop"), OperationConfig(kind="horizontal_flip"))
)


@dataclass
class Workplace:
    """Device, sizes and folder of the rows, and the stores that several of them share."""

    device: torch.device
    scale: Scale
    folder: Path

    @cached_property
    def store(self) -> Path:
        """Packed store of all images."""
        return self._packed("store", self.scale.images)

    @cached_property
    def bcos_store(self) -> Path:
        """Packed store of fewer images, because maps of W are large."""
        return self._packed("bcos", self.scale.bcos_images)

    @cached_property
    def bcos_teacher(self) -> ModelConfig:
        """B-cos teacher of random weights with the statistics of the images.

        Without these, the signal of a random B-cos network vanishes over its layers, and all logits are equal.
        """
        scale = self.scale
        torch.manual_seed(0)
        network = build_model(scale.bcos_teacher, CLASSES).to(self.device).train()
        for module in network.modules():
            if hasattr(module, "momentum"):
                module.momentum = 1.0  # the statistics of the last batch
        files = sorted((self.bcos_store.parent / "bcos-images").rglob("*.jpg"))
        images = [
            decode_frame(path.read_bytes(), (scale.input_size,) * 2)
            for path in files[: min(32, scale.bcos_images)]
        ]
        with torch.no_grad():
            network(torch.stack(images).to(self.device).float() / 255)
        path = self.folder / "bcos.safetensors"
        save_file(
            {name: t.contiguous().cpu() for name, t in network.network.state_dict().items()}, path
        )
        return replace(scale.bcos_teacher, weights=str(path))

    def _packed(self, name: str, count: int) -> Path:
        images = self.folder / f"{name}-images"
        write_images(images, count, self.scale.distinct, self.scale.side)
        pack(images, self.folder / name, self.scale)
        return self.folder / name

    def annotate(self, store: Path, name: str, teacher: ModelConfig, **options: Any) -> None:
        """Compute the pass `name` from the start."""
        for old in store.glob(f"teachers/{name}-*"):
            shutil.rmtree(old)
        annotate = {"name": name} | options.pop("annotate", {})
        config = precompute_config(store, self.scale, teacher=teacher, annotate=annotate, **options)
        precompute.run(config)

    def has_pass(self, store: Path, name: str) -> bool:
        """True if the pass has been computed."""
        return any(store.glob(f"teachers/{name}-*"))

    def batches(self, store: Path, name: str, size: int, count: int) -> tuple[list[Batch], float]:
        """Read training batches with the targets of a pass, and return them with the seconds per image."""
        opened = Store(store)
        dataset = StoreDataset(
            opened, rows_of_split(opened.index, "train"), [pass_named(store, name)]
        )
        views = ViewSchedule(VIEWS, opened.size, seed=0)
        loader = TrainLoader(dataset, views, batch_size=size, seed=0)
        started = time.perf_counter()
        batches = list(islice(loader.epoch(0), count))
        return batches, (time.perf_counter() - started) / (len(batches) * size)
