"""Folders of pictures that get more of them, and options of their stores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from permafrost.config.data import ImageFolderDataConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions
from tests.support.stores import precompute_config

TEACHER = CifarModelConfig(name="resnet8", width=4, weights="random", classes=2)


class Pictures:
    """A folder of pictures that gets more of them."""

    def __init__(self, folder):
        self.folder = folder
        self.labels = {}

    def add(self, name, cls, size=(18, 22), split="train"):
        path = self.folder / split / cls / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(self.labels)).integers(0, 255, (*size, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        self.labels[f"{split}%2F{cls}%2F{name}%2Epng"] = cls

    def add_all(self, names, classes=("cat", "dog"), **options):
        for name in names:
            for cls in classes:
                self.add(f"{name}", cls, **options)

    def path_of(self, name, cls, split="train"):
        return self.folder / split / cls / f"{name}.png"


def growing_options(pictures, store, *, teacher=None, append=False, changed="stop", **others):
    config = precompute_config(
        store,
        teacher,
        data=ImageFolderDataConfig(path=str(pictures.folder)),
        image_size=16,
        shard_size=others.pop("shard_size", 4),
        annotate=PassOptions(batch_size=4),
        **others,
    )
    return replace(config, store=replace(config.store, append=append, changed=changed))
