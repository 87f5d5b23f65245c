"""Reading of a store: speed against stock webdataset on the same tars, and bytes against the values."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset

from permafrost.loading.dataset import StoreDataset
from permafrost.loading.sampler import EpochOrder, GlobalBatchSampler
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store, TeacherPass
from tests.benchmarks.figures import Figure, exact, figure, in_turn
from tests.benchmarks.inputs import TINY, precompute_config, write_tars
from tests.support.images import decode_frame
from tests.support.verbs import precompute

BATCH = 50
STREAMED, CHECKED = {32: 5_000, 224: 1_000}, {32: 6_000, 224: 1_200}
"""Records of an epoch by the side of their images."""
LOADED = 4_000
ROUNDS = 7
CHECKED_ROUNDS = 15
"""Rounds for a difference of a few per cent."""


def stream_32_figure(folder: Path) -> list[Figure]:
    """Measure small images, where parsing takes most of the time."""
    return [_stream_figure("stream_vs_webdataset_32px", folder, STREAMED[32], 32, ">= 5")]


def stream_224_figure(folder: Path) -> list[Figure]:
    """Measure photographs, where decoding takes most of the time on both sides."""
    return [_stream_figure("stream_vs_webdataset_224px", folder, STREAMED[224], 224, ">= 1.2")]


def _stream_figure(name: str, folder: Path, records: int, side: int, aim: str) -> Figure:
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", records, side), folder / "store"
    teacher = replace(TINY, input_size=side)
    for backend in ("zarr", "webdataset"):
        precompute.run(precompute_config(tars, path, backend=backend, teacher=teacher))
    store = Store(path)
    indexed, zipped = sorted(
        store.open_passes([folder.name for folder in store.pass_folders()]),
        key=lambda teacher: any(Path(str(teacher.folder)).glob("*.tar")),
    )
    pairs = in_turn(
        lambda: check(ours(store, indexed), records, side),
        lambda: check(theirs(tars, Path(str(zipped.folder)), side), records, side),
        ROUNDS,
    )
    return figure(name, pairs, faster=True, unit="us/record", scale=1e6 / records, aim=aim)


def public_loader_figures(folder: Path) -> list[Figure]:
    """Measure epochs of permafrost.RecordLoader against those of the loader of a training, with rendered views."""
    import permafrost
    from permafrost.loading.geometry import TargetRequest, view_images, view_targets
    from permafrost.loading.loader import TrainLoader
    from permafrost.loading.random_views import ViewSchedule

    torch.set_num_threads(1)
    records, side, grid = LOADED, 32, (8, 8)
    tars, path = write_tars(folder / "tars", records, side), folder / "store"
    precompute.run(precompute_config(tars, path))
    store = permafrost.open_store(path)
    passes = store.open_passes()
    views = permafrost.augmentation("pad_crop_flip")
    figures = []
    for workers in LOADER_WORKERS:
        public = permafrost.RecordLoader(
            store.select("train"), augment=views, batch_size=BATCH, num_workers=workers
        )
        rows = rows_of_split(store.index, "train")
        schedule = ViewSchedule(views, store.size, seed=0)
        training = TrainLoader(
            *(StoreDataset(store, rows, passes), schedule),
            **{"batch_size": BATCH, "seed": 0, "loader_processes": workers},
        )
        for dataset in (public.dataset, training.dataset):
            dataset.keep_bytes = 0  # type: ignore[attr-defined]  # decode in every epoch, as of a large set

        def read_public(loader: permafrost.RecordLoader = public) -> None:
            counted = 0
            for batch in loader:
                (targets,) = batch.targets(grid)
                counted += _rendered(batch.images, targets.maps, side)
            assert counted == records

        epochs = count()  # whose views are drawn anew, as those of the other side

        def read_training(loader: TrainLoader = training, numbers: Iterator[int] = epochs) -> None:
            counted = 0
            for batch in loader.epoch(next(numbers)):
                (targets,) = view_targets(batch, TargetRequest(grid))
                counted += _rendered(view_images(batch, (side, side)), targets.maps, side)
            assert counted == records

        pairs = in_turn(read_public, read_training, CHECKED_ROUNDS)
        figures.append(
            figure(
                public_loader_name(workers),
                pairs,
                **{"faster": True, "unit": "us/record", "scale": 1e6 / records, "aim": ">= 0.97"},
            )
        )
    return figures


LOADER_WORKERS = (0, 2)


def public_loader_name(workers: int) -> str:
    """Name of a figure."""
    return f"public_loader_{workers}_workers"


SAMPLE_WORKERS = (0, 1, 2)


def samples_name(workers: int) -> str:
    """Name of a figure."""
    return f"samples_{workers}_workers"


def samples_figures(folder: Path) -> list[Figure]:
    """Measure epochs of a stock DataLoader of permafrost.load_store against those of RecordLoader, in random order."""
    import permafrost

    torch.set_num_threads(1)
    records, side = LOADED, 32
    tars, path = write_tars(folder / "tars", records, side), folder / "store"
    precompute.run(precompute_config(tars, path))
    views = permafrost.augmentation("pad_crop_flip")
    figures = []
    for workers in SAMPLE_WORKERS:
        loader = permafrost.RecordLoader(
            permafrost.open_store(path).select("train"),
            **{"augment": views, "batch_size": BATCH, "num_workers": workers},
        )
        samples = permafrost.load_store(path, augment=views)
        kept = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
        stock = torch.utils.data.DataLoader(
            samples, BATCH, shuffle=True, num_workers=workers, **kept
        )
        for dataset in (loader.dataset, samples._dataset):
            dataset.keep_bytes = 0  # type: ignore[attr-defined]  # decode in every epoch, as of a large set
            dataset._start_caches()  # type: ignore[attr-defined]

        epochs = count()

        def read_samples(
            loader: Any = stock, samples: Any = samples, numbers: Iterator[int] = epochs
        ) -> None:
            samples.set_epoch(next(numbers))
            counted = sum(_rendered(batch.image, batch.maps, side) for batch in loader)
            assert counted == records

        def read_batches(loader: Any = loader) -> None:
            assert sum(_rendered(batch.images, batch.maps, side) for batch in loader) == records

        pairs = in_turn(read_samples, read_batches, ROUNDS)
        figures.append(
            figure(
                samples_name(workers),
                pairs,
                **{"faster": True, "unit": "us/record", "scale": 1e6 / records, "aim": ""},
            )
        )
    return figures


def _rendered(images: torch.Tensor, maps: torch.Tensor | None, side: int) -> int:
    assert images.shape[1:] == (3, side, side)
    assert maps is not None
    assert maps.shape == (len(images), 1, 1, 8, 8)
    return len(images)


def ours(store: Store, teacher: TeacherPass) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over one epoch in its shuffled order: frames, logits, maps."""
    dataset = StoreDataset(store, rows_of_split(store.index, "train"), [teacher])
    for positions in GlobalBatchSampler(EpochOrder(dataset.first_positions(), seed=0), BATCH):
        batch = dataset.__getitems__(positions)
        targets = batch.targets[0]
        yield {"frames": batch.inputs, "logits": targets.logits, "maps": targets.maps}


def theirs(tars: Path, teacher: Path, side: int) -> Iterator[dict[str, torch.Tensor]]:
    """Iterate over the same records by stock webdataset: images and columns zipped, in the order of the tars."""
    images = webdataset.WebDataset(_urls(tars), shardshuffle=False)
    columns = webdataset.WebDataset(_urls(teacher), shardshuffle=False)
    batch: list[dict[str, torch.Tensor]] = []
    for image, column in zip(images, columns, strict=True):
        # Keys of the store are unique over all tars.
        assert column["__key__"].endswith(image["__key__"])
        batch.append(
            {
                "frames": decode_frame(image["jpg"], (side, side)),
                "logits": _array(column["logits.npy"]),
                "maps": _array(column["map.npy"]),
            }
        )
        if len(batch) == BATCH:
            yield {name: torch.stack([record[name] for record in batch]) for name in batch[0]}
            batch = []


def _urls(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def _array(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data))).float()


def check(batches: Iterator[dict[str, torch.Tensor]], records: int, side: int) -> None:
    """Check that a side has yielded all records in the expected shapes."""
    counted = 0
    for batch in batches:
        counted += len(batch["frames"])
        assert batch["frames"].shape[1:] == (3, side, side)
        assert len(batch["logits"]) == len(batch["maps"]) == len(batch["frames"])
    assert counted == records


# ---- checksums -----------------------------------------------------------------------------------


def checksums_32_figure(folder: Path) -> list[Figure]:
    """Measure an epoch of small images with every checksum verified against one without checksums."""
    return [_checksums_figure("checksums_epoch_32px", folder, CHECKED[32], 32, "<= 1.05")]


def checksums_224_figure(folder: Path) -> list[Figure]:
    """Measure the same for photographs."""
    return [_checksums_figure("checksums_epoch_224px", folder, CHECKED[224], 224, "<= 1.02")]


def _checksums_figure(name: str, folder: Path, records: int, side: int, aim: str) -> Figure:
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", records, side), folder / "store"
    precompute.run(precompute_config(tars, path, teacher=replace(TINY, input_size=side)))
    store = Store(path)
    (teacher,) = store.open_passes()

    def read() -> None:
        check(ours(store, teacher), records, side)

    def read_unchecked() -> None:
        with _no_checksums():
            read()

    pairs = in_turn(read, read_unchecked, CHECKED_ROUNDS)
    return figure(name, pairs, faster=False, unit="us/record", scale=1e6 / records, aim=aim)


class _Agreeable:
    """Checksum that equals any other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Make readers accept any bytes without computing a CRC-32C."""
    anything = _Agreeable()

    def unchecked(data: bytes) -> _Agreeable:
        return anything

    with mock.patch("google_crc32c.value", unchecked):
        yield


# ---- bytes ---------------------------------------------------------------------------------------


def bytes_figures(folder: Path) -> list[Figure]:
    """Measure a pass on disk against its values, and against one file per image as the e2KD release reads them."""
    records = STREAMED[32]
    tars, path = write_tars(folder / "tars", records, 32), folder / "store"
    precompute.run(precompute_config(tars, path))
    (teacher,) = Store(path).open_passes()
    values = teacher.read_shard(Store(path).manifest.shards[0])
    values_bytes = sum(array[0].nbytes for array in values.values())
    whole = sum(p.stat().st_size for p in Path(str(teacher.folder)).rglob("*") if p.is_file())
    one = folder / "0.pt"
    torch.save(_release_entry(values), one)
    block = one.stat().st_blocks * 512  # a file occupies whole blocks
    return [
        exact("bytes_vs_values", whole / records, values_bytes, unit="bytes/record", aim="<= 1.10"),
        exact("bytes_vs_one_pt_per_image", whole / records, block, unit="bytes/record", aim=""),
    ]


def _release_entry(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits and explanation of one image, in the half-precision dtypes of the store."""
    return {
        "output": torch.tensor(values["logits"][0, 0]),
        "weight": torch.tensor(values["map"][0, 0]),
    }
