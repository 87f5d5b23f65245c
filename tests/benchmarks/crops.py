"""Random crops of photographs at full size: views of a store's original images against other readers.

Every side does the same work: decode a JPEG, RandomResizedCrop(224, antialias=True) with .08 to 1 of its area, flip
half of the views, and yield shuffled batches of 64 views as bytes. One worker is this process, one loader process or
one thread of a library, and two are two of them, whichever is the fastest on each side.

crops_photographs_1_worker, _2_workers  against the best of the other readers
crops_photographs_vs_decoding           an epoch in this process beside the JPEG decoder alone, on the same files
crops_scaled_decoding_vs_full           views of 64 pixels, decoded to 1/2, 1/4 or 1/8 (augment.scaled_decoding)
crops_scaled_decoding_error             mean difference of these views' pixels, as a part of white
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from permafrost import augmentation
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.loader import TrainLoader
from permafrost.loading.random_views import schedule_views
from permafrost.loading.subset import rows_of_split
from permafrost.store.image_decoding import decode_pixels
from permafrost.store.reader import Store
from tests.benchmarks.figures import (
    Figure,
    against_best,
    exact,
    figure,
    in_rounds,
    in_turn,
    seconds,
)
from tests.benchmarks.inputs import pack, write_photographs
from tests.benchmarks.peer import process_options
from tests.benchmarks.peers import require_packages
from tests.benchmarks.streams import OURS

BATCH = 64
SIDE = 224
PHOTOGRAPHS = 30 * BATCH
"""Records of an epoch, whose files are different, as they are numbered."""
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
WORKERS = (1, 2)
ROUNDS = 6
DECODING_NAME = "crops_photographs_vs_decoding"
SCALED_NAME = "crops_scaled_decoding_vs_full"
ERROR_NAME = "crops_scaled_decoding_error"
SMALL_SIDE = 64
"""Side of views of which nine in ten windows are at least twice as large."""

Views = Callable[[], Iterator[Tensor]]
"""Function that iterates over the batches of an epoch, u8 [B, 224, 224, 3]."""


def crops_name(workers: int) -> str:
    """Return the name of a figure."""
    return f"crops_photographs_{workers}_worker{'s' if workers > 1 else ''}"


def crops_names() -> tuple[str, ...]:
    """Names of all figures."""
    return (*map(crops_name, WORKERS), DECODING_NAME, SCALED_NAME, ERROR_NAME)


def crops_figures(folder: Path) -> list[Figure]:
    """Measure the rows."""
    require_packages({"DALI": "nvidia.dali", "SPDL": "spdl"})
    torch.set_num_threads(1)
    tars = write_photographs(folder / "tars", PHOTOGRAPHS)
    store = pack(tars, folder / "store")
    files = extract_files(tars, folder / "files")
    figures = [_against_readers(store, files, workers) for workers in WORKERS]
    jpegs = [path.read_bytes() for path in sorted(files.rglob("*.jpg"))]

    def decode() -> None:
        for jpeg in jpegs:
            decode_pixels(jpeg)

    pairs = in_turn(partial(read, store_views(store, 0, 1)), decode, ROUNDS)
    per_record = {"unit": "us/record", "scale": 1e6 / PHOTOGRAPHS}
    figures.append(figure(DECODING_NAME, pairs, faster=False, aim="<= 1.4", **per_record))
    scaled, full = (
        store_views(store, 0, 1, side=SMALL_SIDE, scaled_decoding=scaled)
        for scaled in (True, False)
    )
    differences = [
        float((one.float() - other.float()).abs().mean())
        for one, other in zip(scaled(), full(), strict=True)
    ]
    pairs = in_turn(partial(read, scaled, SMALL_SIDE), partial(read, full, SMALL_SIDE), ROUNDS)
    figures.append(figure(SCALED_NAME, pairs, faster=True, aim=">= 1.0", **per_record))
    return [*figures, exact(ERROR_NAME, mean(differences), 255, unit="levels", aim="")]


def extract_files(tars: Path, folder: Path) -> Path:
    """Write the images of the tars to files of a folder with one class."""
    (folder / "all").mkdir(parents=True)
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".jpg"):
                    (folder / "all" / member.name).write_bytes(file.read())
    return folder


def _against_readers(store: Store, files: Path, workers: int) -> Figure:
    """Measure all readers in rounds, each in its fastest way, after an epoch of each whose pixels are compared."""
    processes = [0, 1] if workers == 1 else [2]
    ours = [store_views(store, number, 1) for number in processes]
    if workers > 1:
        ours.append(store_views(store, 0, workers))
    ways: dict[str, list[Views]] = {OURS: ours}
    for title, regions in (("DALI", False), ("DALI, decoder of regions", True)):
        ways[title] = [dali_views(files, workers, regions=regions)]
    for title, crop in (("torchvision, tensors", crop_tensor), ("torchvision, PIL", crop_picture)):
        ways[title] = [folder_views(files, number, crop) for number in processes]
    ways["SPDL, torchvision's tensors"] = [spdl_views(files, workers)]
    sides = {title: _fastest(views) for title, views in ways.items()}
    levels = {title: read(views) for title, views in sides.items()}
    assert max(levels.values()) - min(levels.values()) < 3, f"the sides see other images: {levels}"
    times = in_rounds({title: partial(read, views) for title, views in sides.items()}, ROUNDS)
    scale = 1e6 / PHOTOGRAPHS
    return against_best(crops_name(workers), times, unit="us/record", scale=scale, aim=">= 1.25")


def _fastest(ways: Sequence[Views]) -> Views:
    """Return the way whose second epoch is the shortest; the first one starts its processes."""
    for views in ways:
        read(views)
    return ways[0] if len(ways) == 1 else min(ways, key=lambda views: seconds(partial(read, views)))


def read(views: Views, side: int = SIDE) -> float:
    """Read one epoch, check its shapes, and return the mean level of some of its pixels."""
    levels, counted = [], 0
    for batch in views():
        assert batch.dtype == torch.uint8
        assert batch.shape[1:] == (side, side, 3)
        counted += len(batch)
        levels.append(float(batch[:, ::32, ::32].float().mean()))
    assert counted == PHOTOGRAPHS
    return mean(levels)


# ---- readers -------------------------------------------------------------------------------------


def store_views(
    store: Store, processes: int, threads: int, *, side: int = SIDE, **options: Any
) -> Views:
    """Views of a store, as a training reads them, decoded in every epoch as of a large set."""
    records = StoreDataset(
        store, rows_of_split(store.index, "train"), [], decode_threads=threads, keep_bytes=0
    )
    augment = augmentation("resized_crop_flip", size=side, **options)
    loader = TrainLoader(
        records,
        schedule_views(records, augment, 0),
        view_size=(side, side),
        batch_size=BATCH,
        seed=0,
        loader_processes=processes,
    )
    epochs = count()

    def views() -> Iterator[Tensor]:
        for batch in loader.epoch(next(epochs)):
            yield batch.inputs.permute(0, 2, 3, 1)

    return views


def dali_views(files: Path, threads: int, *, regions: bool) -> Views:
    """Views of NVIDIA DALI's pipeline on the CPU.

    Args:
        files: Folder of a folder of images.
        threads: Its threads.
        regions: True decodes only the cropped region of an image, where the format allows it.
    """
    from nvidia.dali import fn, pipeline_def

    crop: dict[str, Any] = {"random_area": AREA, "random_aspect_ratio": RATIO}

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, seed=0)
    def crops() -> Any:
        jpegs, _ = fn.readers.file(file_root=str(files), random_shuffle=True)
        if regions:
            images = fn.decoders.image_random_crop(jpegs, **crop)
            images = fn.resize(images, size=(SIDE, SIDE), antialias=True)
        else:
            images = fn.decoders.image(jpegs)
            images = fn.random_resized_crop(images, size=(SIDE, SIDE), antialias=True, **crop)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    pipeline = crops()
    pipeline.build()

    def views() -> Iterator[Tensor]:
        for _ in range(PHOTOGRAPHS // BATCH):
            (batch,) = pipeline.run()
            yield torch.from_dlpack(batch.as_tensor())

    return views


_TRANSFORMS = v2.Compose(
    [
        v2.RandomResizedCrop(SIDE, scale=AREA, ratio=RATIO, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
)


def crop_tensor(data: bytes) -> Tensor:
    """Decode, crop and flip by torchvision's operations on tensors: u8 [224, 224, 3]."""
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return _TRANSFORMS(image).permute(1, 2, 0)  # type: ignore[no-any-return]


def crop_picture(data: bytes) -> Tensor:
    """Decode, crop and flip by torchvision's operations on PIL images: u8 [224, 224, 3]."""
    view = _TRANSFORMS(Image.open(io.BytesIO(data)).convert("RGB"))
    return v2.functional.pil_to_tensor(view).permute(1, 2, 0)  # type: ignore[no-any-return]


def folder_views(files: Path, processes: int, crop: Callable[[bytes], Tensor]) -> Views:
    """Views of torchvision's ImageFolder and torch's data loader."""
    images = ImageFolder(str(files), loader=partial(_crop_file, crop=crop))
    loader: DataLoader[Any] = DataLoader(
        images, batch_size=BATCH, shuffle=True, **process_options(processes)
    )

    def views() -> Iterator[Tensor]:
        for batch, _ in loader:
            yield batch

    return views


def _crop_file(path: str, crop: Callable[[bytes], Tensor]) -> Any:
    return crop(Path(path).read_bytes())


def spdl_views(files: Path, threads: int) -> Views:
    """Views of SPDL's threads, each of which decodes and crops a batch."""
    from spdl.pipeline import PipelineBuilder

    paths, random = sorted(files.rglob("*.jpg")), Random(0)

    def crop(batch: list[Path]) -> Tensor:
        return torch.stack([crop_tensor(path.read_bytes()) for path in batch])

    def views() -> Iterator[Tensor]:
        order = random.sample(paths, len(paths))
        batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        builder = PipelineBuilder().add_source(batches).pipe(crop, concurrency=threads).add_sink(3)
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            yield from pipeline

    return views
