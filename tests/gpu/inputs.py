"""Images and stores that are made up on the spot."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.data import ImageFolderDataConfig, NoDataConfig
from permafrost.config.explainers import GradCamConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig, StoreOptions
from permafrost.store.reader import Store, TeacherPass
from tests.gpu.scale import CLASSES, Scale
from tests.support.verbs import precompute


def jpeg(seed: int, side: int) -> bytes:
    """JPEG of a few large areas with some noise, about 20 kB at 256 pixels."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    noise = generator.normal(
        0, 8, (side, side, 1)
    )  # gray, because decoders upsample colors differently
    pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_images(folder: Path, count: int, distinct: int, side: int) -> Path:
    """Write a folder of images per class."""
    pool = [jpeg(seed, side) for seed in range(distinct)]
    for number in range(count):
        parent = folder / f"class{number % CLASSES}"
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{number:06d}.jpg").write_bytes(pool[number % distinct])
    return folder


def pack(images: Path, store: Path, scale: Scale) -> Store:
    """Pack the images into a store without a teacher."""
    data = ImageFolderDataConfig(path=str(images))
    precompute.run(precompute_config(store, scale, data=data, teacher=NoModelConfig()))
    return Store(store)


def precompute_config(store: Path, scale: Scale, **options: Any) -> PrecomputeConfig:
    """Options of a precompute in this process. `annotate` holds options of PassOptions."""
    annotate = {"precision": scale.precision, "batch_size": scale.batch_size}
    annotate |= options.pop("annotate", {})
    config = PrecomputeConfig(
        data=options.pop("data", NoDataConfig()),
        store=StoreOptions(path=str(store), shard_size=256),
        teacher=options.pop("teacher"),
        explainer=options.pop("explainer", GradCamConfig()),
        annotate=PassOptions(**annotate),
        cluster=LocalClusterConfig(decode_threads=scale.decode_threads),
        executor="serial",
        run=str(store.parent / "run"),
    )
    return replace(config, **options)


def pass_named(store: Path, name: str) -> TeacherPass:
    """Pass of a store whose `annotate.name` is `name`."""
    (found,) = (one for one in Store(store).open_passes() if one.name.startswith(f"{name}-"))
    return found


def logits_of(store: Path, name: str) -> NDArray[np.generic]:
    """Stored logits of a pass, [n, V, K]."""
    found = pass_named(store, name)
    return np.concatenate([found.read_shard(shard)["logits"] for shard in Store(store).shards])
