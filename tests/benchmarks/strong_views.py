"""Strong views: RandAugment of a batch against torchvision image by image, and replay of strong against plain views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from permafrost.config.augment import AugmentOptions, PolicyConfig, RandomViewsConfig
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.geometry import view_images
from permafrost.loading.loader import TrainLoader
from permafrost.loading.pixel_changes import change_rows
from permafrost.loading.recipes import PixelSchedule
from permafrost.loading.subset import rows_of_split
from permafrost.store.reader import Store
from tests.benchmarks.figures import Figure, figure, in_turn
from tests.benchmarks.inputs import CLASSES, precompute_config, write_tars
from tests.benchmarks.stand_in import StandInConfig
from tests.benchmarks.steps import VIEWS
from tests.support.verbs import precompute

RANDAUGMENT = PolicyConfig(kind="randaugment")
IMAGES = {32: 512, 224: 64}
"""Images of a round, by their side in pixels."""
RECORDS = 4_000
BATCH = 100
ROUNDS = 9


def randaugment_name(side: int) -> str:
    """Return the name of the figure at a side in pixels."""
    return f"randaugment_vs_torchvision_{side}px"


def randaugment_figures(folder: Path) -> list[Figure]:
    """Measure what RandAugment adds to a view: draws and changes of a batch, against torchvision image by image.

    Shears, rotations and translations are part of the view's matrix, whose warp is there without them.
    """
    torch.set_num_threads(1)
    figures = []
    for side, images in IMAGES.items():
        generator = torch.Generator().manual_seed(0)
        frames = torch.randint(
            0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator
        )
        pairs = in_turn(_batch_of_floats(frames), _image_by_image(frames), ROUNDS)
        per_image = {"unit": "us/image", "scale": 1e6 / images}
        name = randaugment_name(side)
        figures.append(figure(name, pairs, faster=True, aim=">= 2.0", **per_image))
    return figures


def _batch_of_floats(frames: torch.Tensor) -> Callable[[], None]:
    floats, room = frames / 255, torch.empty_like(frames, dtype=torch.float32)
    schedule, epochs = PixelSchedule([RANDAUGMENT], 0), count()

    def change() -> None:
        room.copy_(floats)  # what a warp has made is changed in place
        change_rows(room, schedule.draw(next(epochs), 0, len(floats)))

    return change


def _image_by_image(frames: torch.Tensor) -> Callable[[], None]:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment

    transform = RandAugment(interpolation=InterpolationMode.BILINEAR)

    def change() -> None:
        for frame in frames:
            transform(frame)

    return change


def strong_replay_figure(folder: Path) -> list[Figure]:
    """Measure reading and rendering of strong stored views, against views of shifts and flips."""
    torch.set_num_threads(1)
    tars, path = write_tars(folder / "tars", RECORDS, 32), folder / "store"
    config = precompute_config(tars, path, teacher=StandInConfig(classes=CLASSES))
    strong = AugmentOptions(operations=(*VIEWS.operations, RANDAUGMENT))
    readers = []
    for augment in (strong, VIEWS):
        before = (
            {each.name for each in Store(path).pass_folders(stored_views=True)}
            if readers
            else set()
        )
        precompute.run(replace(config, views=RandomViewsConfig(count=1), augment=augment))
        store = Store(path)
        (name,) = {each.name for each in store.pass_folders(stored_views=True)} - before
        readers.append(_epoch(store, name))
    pairs = in_turn(*readers, ROUNDS)
    per_view = {"unit": "us/view", "scale": 1e6 / RECORDS}
    return [figure("replay_strong_vs_plain_views", pairs, faster=False, aim="", **per_view)]


def _epoch(store: Store, name: str) -> Callable[[], None]:
    """Return a function that reads and renders one view of each record."""
    rows = rows_of_split(store.index, "train")
    passes = [store.open_pass(name, stored_views=True)]
    dataset = StoreDataset(store, rows, passes, keep_bytes=0)  # decode in every epoch
    stream = TrainLoader(dataset, None, batch_size=BATCH, seed=0)
    epochs = count()

    def read() -> None:
        for batch in stream.epoch(next(epochs)):
            assert view_images(batch, store.size).shape == (BATCH, 3, *store.size)

    return read
