"""A store of small photographs, and what other tools would have written about them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from permafrost.config.compose import compose
from permafrost.config.explainers import EXPLAINERS
from permafrost.config.plugins import load_plugins
from permafrost.config.verbs import build_verb_config
from permafrost.store.reader import Store
from tests.support.verbs import ingest, precompute

CLASSES = 4
PHOTOS = 24


@dataclass(frozen=True)
class Photographs:
    """Images of a folder, and the store that has them."""

    folder: Path
    paths: list[str]
    """Path of each image below the folder, sorted as ImageFolder sorts them."""
    sizes: np.ndarray
    """Heights and widths, [n, 2]."""
    digests: list[str]
    store: Path

    @property
    def stems(self):
        return [Path(path).stem for path in self.paths]

    def open(self):
        return Store(self.store)


def make_photographs(folder: Path) -> Photographs:
    """Write images of several sizes in train/<class>/, and pack them."""
    random = np.random.default_rng(0)
    paths, sizes = [], []
    for number in range(PHOTOS):
        path = f"train/n{number % CLASSES}/photo_{number:02d}.png"
        height, width = random.integers(30, 50, 2)
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        target = folder / "photos" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
        paths.append(path)
        sizes.append((height, width))
    order = sorted(range(PHOTOS), key=lambda n: paths[n].split("/"))
    paths = [paths[n] for n in order]
    store = folder / "store"
    options = [f"data.path={folder / 'photos'}", "store.image_size=32", "store.shard_size=7"]
    run_precompute(store, "data=image_folder", *options, "teacher=none")
    return Photographs(
        folder=folder / "photos",
        paths=paths,
        sizes=np.array([sizes[n] for n in order]),
        digests=[hashlib.sha256((folder / "photos" / p).read_bytes()).hexdigest() for p in paths],
        store=store,
    )


def run_precompute(store, *words):
    words = [*words, f"store.path={store}", "executor=serial"]
    return precompute.run(build_verb_config("precompute", compose("precompute", words)))


def run_ingest(store, *words):
    """Run the stage on typed words, serially."""
    words = [*words, f"store.path={store}", "executor=serial"]
    return ingest.run(build_verb_config("ingest", compose("ingest", words)))


def values_by_key(store, name, *, stored_views=False):
    """Read all fields of a pass: field -> key -> [V, ...]."""
    opened = store.open_pass(name, stored_views=stored_views)
    values = {spec.name: {} for spec in opened.manifest.fields}
    for shard in store.shards:
        keys = opened.shard_keys(shard)
        if not keys:
            continue
        for field, array in opened.read_shard(shard).items():
            values[field] |= dict(zip(keys, array, strict=True))
    return values


EXPLAINERS_OF_A_USER = """
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from permafrost.config.explainers import EXPLAINERS, ExplainerConfig


@dataclass(frozen=True, kw_only=True)
class SignedConfig(ExplainerConfig):
    implementation: ClassVar[str] = "signed_maps:signed"
    kind: Literal["signed_maps"] = "signed_maps"


@dataclass(frozen=True, kw_only=True)
class BrokenConfig(ExplainerConfig):
    implementation: ClassVar[str] = "signed_maps:broken"
    kind: Literal["broken_maps"] = "broken_maps"


def signed(model, output, target_class):
    maps = output.features.mean(dim=1)[:, None, None]
    return (maps - maps.mean(dim=(-1, -2), keepdim=True)).expand(-1, target_class.shape[1], -1, -1, -1)


def broken(model, output, target_class):
    raise RuntimeError("no gradient")


EXPLAINERS["signed_maps"] = SignedConfig
EXPLAINERS["broken_maps"] = BrokenConfig
"""


@contextmanager
def loaded_plugin(path: Path) -> Iterator[None]:
    """Load the explainers signed_maps and broken_maps of a file signed_maps.py, which is written if there is none."""
    if not path.exists():
        path.write_text(EXPLAINERS_OF_A_USER)
    load_plugins([str(path)])
    try:
        yield
    finally:
        for name in ("signed_maps", "broken_maps"):
            del EXPLAINERS[name]
        sys.modules.pop("signed_maps")
        sys.path.remove(str(path.parent))
