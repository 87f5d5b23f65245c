"""Real JPEGs for the figures: crops of two photographs in plain WebDataset tars, generated in seconds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.explainers import GradCamConfig
from permafrost.config.models import CifarModelConfig, NoModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig, StoreOptions
from permafrost.store.reader import Store
from permafrost_sources.options import WebDatasetDataConfig
from tests.benchmarks.peer import MissingPeerError
from tests.support.paths import SHARED_DATA
from tests.support.verbs import precompute

CLASSES = 10
PHOTOGRAPHS = SHARED_DATA / "photos"
SHARD_RECORDS = 1000
TINY = CifarModelConfig(name="resnet8", width=4, classes=CLASSES, weights="random")
"""Teacher of the figures that do not measure the teacher."""


def write_tars(
    folder: Path,
    records: int,
    side: int,
    distinct: int | None = None,
    *,
    first: int = 0,
    per_tar: int = SHARD_RECORDS,
) -> Path:
    """Write `records` JPEGs of side x side pixels with their labels. Every tar contains all classes.

    distinct  number of different images, which then repeat; None makes every image different
    first     number of the first record, above 0 to add tars to a folder
    per_tar   records of each tar
    """
    folder.mkdir(parents=True, exist_ok=first > 0)
    generator = np.random.default_rng(0)
    pool = [_jpeg(generator, side) for _ in range(distinct or 0)]
    for start in range(first, first + records, per_tar):
        name = folder / f"train-{start:08d}.tar"
        with webdataset.TarWriter(str(name), mtime=0) as tar:
            for number in range(start, min(start + per_tar, first + records)):
                sample = {
                    "__key__": f"{number:08d}",
                    "jpg": pool[number % distinct] if distinct else _jpeg(generator, side),
                }
                tar.write(sample | {"cls": str(number % CLASSES)})
    return folder


def images_of(tars: Path) -> Iterator[bytes]:
    """Iterate over the JPEGs of tars."""
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    yield tar.extractfile(member).read()  # type: ignore[union-attr]


def write_photographs(folder: Path, records: int) -> Path:
    """Write the photographs of ../shared/data at full size, repeated with a number in each file.

    Raises:
        MissingPeerError: If they are not there.
    """
    photographs = sorted(PHOTOGRAPHS.rglob("*.JPEG")) + sorted(PHOTOGRAPHS.rglob("*.jpg"))
    if not photographs:
        raise MissingPeerError(f"photographs: {PHOTOGRAPHS} is not there")
    files = [path.read_bytes() for path in photographs]
    folder.mkdir(parents=True)
    for start in range(0, records, SHARD_RECORDS):
        name = folder / f"train-{start // SHARD_RECORDS:06d}.tar"
        with webdataset.TarWriter(str(name), mtime=0) as tar:
            for number in range(start, min(start + SHARD_RECORDS, records)):
                jpeg, text = files[number % len(files)], str(number).encode()
                comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
                sample = {"__key__": f"{number:08d}", "jpg": jpeg[:2] + comment + jpeg[2:]}
                tar.write(sample | {"cls": str(number % CLASSES)})
    return folder


def _jpeg(generator: np.random.Generator, side: int) -> bytes:
    photograph = _photographs()[generator.integers(2)]
    zoom = max(side, int(generator.integers(side, 4 * side)))
    zoom = min(zoom, *photograph.size)
    x, y = (int(generator.integers(0, extent - zoom + 1)) for extent in photograph.size)
    crop = photograph.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + zoom, y + zoom))
    buffer = io.BytesIO()
    crop.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def precompute_config(tars: Path, store: Path, **options: Any) -> PrecomputeConfig:
    """Options of a precompute of the tars in this process with one thread."""
    return PrecomputeConfig(
        data=WebDatasetDataConfig(path=str(tars)),
        store=StoreOptions(path=str(store), backend=options.pop("backend", "zarr")),
        teacher=options.pop("teacher", TINY),
        explainer=options.pop("explainer", GradCamConfig()),
        annotate=PassOptions(outputs=options.pop("outputs", ("logits", "maps"))),
        cluster=LocalClusterConfig(),
        executor=options.pop("executor", "serial"),
        run=str(store.parent / "run"),
    )


def pack(tars: Path, store: Path) -> Store:
    """Index the tars in a store without a teacher."""
    precompute.run(precompute_config(tars, store, teacher=NoModelConfig()))
    return Store(store)
