"""Stored views of a teacher, replayed for a student: drawn once per shard and stored as values.

A pass of stored views covers a selection of one split. Its rows are those records in the order of the shards. The
teacher's views use what is stored, rounded matrices in float32 and values of the recipe in float16, so a student with
the same input size receives the teacher's pixels bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    RandomViewsConfig,
    ViewsConfig,
    describe_mix,
    describe_operations,
)
from permafrost.config.options import identifying_values, resolve_implementation
from permafrost.config.store import PrecomputeConfig, SubsetOptions
from permafrost.core.batches import Mixture, PixelChange, Rendering
from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.records import (
    MIXTURE_FIELD,
    MOVE_FIELD,
    PARTNER_FIELD,
    PIXEL_FIELD,
    VIEW_FIELD,
    WINDOW_FIELD,
    FieldSpec,
)
from permafrost.loading.mixtures import UNMIXED, draw_mixtures, draw_partners, mixture_of
from permafrost.loading.random_views import schedule_views
from permafrost.loading.recipes import PixelSchedule, Recipe
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.subset import select_training_rows
from permafrost.loading.windows import Views, WindowCutter, stack_views, stored_views_of
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.index import RowNumbers
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry


@dataclass(frozen=True)
class DrawnMixtures:
    """Second images of the stored views of n records."""

    values: NDArray[np.float16]
    """Shares and boxes, f16 [n, V, 5]."""
    partners: NDArray[np.int64]
    """Place of the second record among the n, i64 [n, V]."""
    shard_rows: NDArray[np.int64]
    """Row of each of the n records in its shard, i64 [n]."""

    def select(self, rows: slice) -> DrawnMixtures:
        """Return those of some of the records, among which their second ones are."""
        partners = self.partners[rows] - (rows.start or 0)
        return DrawnMixtures(self.values[rows], partners, self.shard_rows[rows])

    def at_view(self, view: int) -> Mixture:
        """Return the mixtures of the views of a number."""
        return mixture_of(self.values[:, view], torch.from_numpy(self.partners[:, view]))

    def fields(self) -> dict[str, NDArray[np.generic]]:
        """Return the values of the fields by name."""
        return {
            MIXTURE_FIELD.name: self.values,
            PARTNER_FIELD.name: self.shard_rows[self.partners][:, :, None].astype(np.int32),
        }


@dataclass(frozen=True)
class DrawnViews:
    """Stored views of n records."""

    views: Views
    """Windows and moves, [n, V]."""
    pixels: Tensor | None = None
    """Values of the recipe, f16 [n, V, C], None if the views do not change pixels."""
    recipe: Recipe | None = None
    """Recipe of the views, None if their matrices are all that is known."""
    mixtures: DrawnMixtures | None = None
    """Second image of each view and its place, None if views are not mixed."""
    rendering: Rendering = field(default_factory=Rendering)
    """Rules by which the views show the images."""
    cuts_originals: bool = False
    """True if the views' windows are cut from the original images."""

    @property
    def count(self) -> int:
        """Number V of views per record."""
        return self.views.canonical_from_view.shape[1]

    def select(self, rows: slice) -> DrawnViews:
        """Return the views of some of the records, whole blocks of them if they are mixed."""
        pixels = None if self.pixels is None else self.pixels[rows]
        mixtures = None if self.mixtures is None else self.mixtures.select(rows)
        return replace(self, views=self.views.select(rows), pixels=pixels, mixtures=mixtures)

    def to_cut(self, rows: slice) -> DrawnViews | None:
        """Return what it takes to cut the views of some of the records from their originals, None if they are not."""
        if not self.cuts_originals:
            return None
        return DrawnViews(self.views.select(rows), rendering=self.rendering, cuts_originals=True)

    def changes(self, view: int) -> tuple[PixelChange, ...]:
        """Return the changes of the pixels of each record's view of this number."""
        recipe, pixels = self.recipe, self.pixels
        return () if recipe is None or pixels is None else recipe.changes(pixels[:, view])

    def fields(self) -> dict[str, NDArray[np.generic]]:
        """Return the values of the fields of `StoredViews.fields` by name."""
        fields: dict[str, NDArray[np.generic]] = {}
        if self.mixtures is not None:
            fields |= self.mixtures.fields()
        if self.pixels is not None:
            fields[PIXEL_FIELD] = self.pixels.numpy()
        views = self.views
        if views.windows is None:
            rows = 3 if self.pixels is None else 2
            fields[VIEW_FIELD.name] = views.canonical_from_view[:, :, :rows].numpy()
        else:
            fields[WINDOW_FIELD.name] = views.windows.numpy()
        if views.steps is not None and self.recipe is not None and self.recipe.stored_steps:
            fields[MOVE_FIELD.name] = views.steps[:, :, self.recipe.stored_steps, :2].numpy()
        return fields


@dataclass(frozen=True, kw_only=True)
class StoredViews:
    """The records that a pass covers, and their views."""

    config: ViewsConfig
    augment: AugmentOptions
    split: str
    subset: SubsetOptions
    rows: RowNumbers
    """Covered rows of the index, ascending."""
    shards: NDArray[np.int64]
    """Numbers of the shards with covered rows, ascending."""
    block: int
    """Number of records among which the second ones of mixtures are drawn."""
    cuts_originals: bool = False
    """True if the teacher receives windows of the original images in place of parts of the frames."""

    def rows_of(self, store: Store, shard: ShardEntry) -> NDArray[np.int64]:
        """Return the covered rows of a shard, counted from its beginning, ascending."""
        here = store.rows_of_shard(store.shards.number_of(shard.name))
        if isinstance(self.rows, range):
            covered = np.arange(max(here.start, self.rows.start), min(here.stop, self.rows.stop))
            return covered - here.start
        first, last = np.searchsorted(self.rows, [here.start, here.stop])
        return self.rows[first:last] - here.start

    def position(self, store: Store, shard: ShardEntry) -> int:
        """Return the position of a shard among those with covered rows."""
        return int(np.searchsorted(self.shards, store.shards.number_of(shard.name)))

    @property
    def count(self) -> int:
        """Number V of views per record."""
        return self.config.count

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describe everything that determines the views, as `views` and `selection` of the manifest."""
        views: dict[str, Any] = {
            "count": self.config.count,
            "sampler": self.config.kind,
            "seed": self.config.seed,
        }
        if self.config.kind == "random":
            views["operations"] = describe_operations(self.augment.operations)
            views |= {"edges": self.augment.edges, "border": self.augment.border}
            if self.augment.interpolation != Rendering.interpolation:
                views["interpolation"] = self.augment.interpolation
            views["pixels"] = "originals" if self.cuts_originals else "frames"
        if self.config.center_crop is not None:
            views["center_crop"] = self.config.center_crop
        if self.mix:
            views |= {"mix": describe_mix(self.mix), "mix_block": self.block}
        return views, {"split": self.split, "subset": identifying_values(self.subset)}

    @property
    def mix(self) -> tuple[MixConfig, ...]:
        """Mixtures of the views."""
        config = self.config
        return config.mix if isinstance(config, RandomViewsConfig) and config.mixes else ()

    @property
    def recipe(self) -> Recipe:
        """Recipe of what changes the pixels of the views, of no values if nothing does."""
        return Recipe(self.augment.operations if self.config.kind == "random" else ())

    def fields(self) -> list[FieldSpec]:
        """Return the fields that describe the views: their places, and values of changes of pixels."""
        places = place_fields_of(self.augment) if self.config.kind == "random" else ()
        return fields_of_views(self.recipe, mixed=bool(self.mix), place_fields=places)

    def draw(self, store: Store, shard: ShardEntry) -> DrawnViews:
        """Draw the views of the shard's covered records.

        Views are drawn for all records of the shard, so those of a record do not depend on the selection.
        """
        draw = resolve_implementation(type(self.config))
        covered = torch.from_numpy(self.rows_of(store, shard))
        views: Views = draw(self.config, self.augment, store, shard)
        drawn = DrawnViews(
            views.select(covered),
            mixtures=self._draw_mixtures(shard, covered.numpy()),
            rendering=Rendering.of(self.describe()[0]),
            cuts_originals=self.cuts_originals,
        )
        recipe = self.recipe
        if recipe.width:
            side = self.augment.side_of(store.size)
            schedule = PixelSchedule(
                self.augment.operations,
                derive_seed(self.config.seed, "stored views", shard.name),
                side,
            )
            rows = [schedule.rows(view, 0, shard.records) for view in range(self.count)]
            drawn = replace(drawn, pixels=torch.stack(rows, dim=1)[covered].half())
        drawn = replace(drawn, recipe=recipe)
        # The views of the teacher are those of the stored values, which are rounded.
        first = store.rows_of_shard(store.shards.number_of(shard.name)).start
        sizes = SelectedRecords(store, first + covered.numpy()).sizes()
        return replace(
            drawn, views=stored_views_of(drawn.fields(), recipe, sizes, store.size, shard.name)
        )

    def _draw_mixtures(self, shard: ShardEntry, covered: NDArray[np.int64]) -> DrawnMixtures | None:
        """Draw the second record of each view among the covered ones, and its place."""
        if not self.mix:
            return None
        values, partners = [], []
        for view in range(self.count):
            seed = derive_seed(self.config.seed, "stored mixtures", shard.name, view)
            generator = np.random.default_rng(seed)
            partners.append(draw_partners(generator, len(covered), self.block))
            drawn = draw_mixtures(self.mix, generator, len(covered))
            drawn[partners[-1] == np.arange(len(covered))] = UNMIXED
            values.append(drawn.astype(np.float16))
        return DrawnMixtures(np.stack(values, axis=1), np.stack(partners, axis=1), covered)


def place_fields_of(augment: AugmentOptions) -> tuple[FieldSpec, ...]:
    """Return the fields of the windows and moves of random views; none for views that are one matrix."""
    if augment.edges == "image":
        return ()
    number = len(Recipe(augment.operations).stored_steps)
    return WINDOW_FIELD, *([replace(MOVE_FIELD, shape=(number, 2, 3))] if number else [])


def fields_of_views(
    recipe: Recipe, *, mixed: bool, place_fields: Sequence[FieldSpec] = ()
) -> list[FieldSpec]:
    """Return the fields that describe stored views: their places, values of changes of pixels, and mixtures.

    Args:
        recipe: Recipe of the changes of pixels.
        mixed: True if the views are mixtures.
        place_fields: Fields of windows and moves; none for views that are one matrix.
    """
    mixtures = [MIXTURE_FIELD, PARTNER_FIELD] if mixed else []
    if not recipe.width:
        return [*(place_fields or [VIEW_FIELD]), *mixtures]
    pixels = FieldSpec(name=PIXEL_FIELD, shape=(recipe.width,), dtype="float16", axes=("value",))
    return [*(place_fields or [replace(VIEW_FIELD, shape=(2, 3))]), pixels, *mixtures]


def read_inputs(
    frames: ShardFrames, views: DrawnViews | None, size: tuple[int, int], start: int, stop: int
) -> FrameBatch:
    """Read what a teacher sees of records: their frames, or windows of the original images, each decoded once.

    Args:
        frames: Records of a shard.
        views: Views of all of them; None for the canonical one.
        size: (height, width) of windows.
        start: First record.
        stop: The one after the last.
    """
    windows = None if views is None else views.views.windows
    if views is None or windows is None or not views.cuts_originals:
        return frames.read(start, stop)
    at = np.repeat(np.arange(start, stop), views.count)

    def read(numbers: NDArray[np.int64], use: Callable[[int, bytes, str], None]) -> None:
        for number, (data, where) in enumerate(frames.contents(at[numbers])):
            use(number, data, where)

    cutter = WindowCutter(size, views.rendering.border)
    cut = cutter.cut(at, windows[start:stop].flatten(0, 1), frames.sizes(at), read)
    return frames.batch(cut.reshape(-1, views.count, *cut.shape[1:]), start, stop)


def read_arrays(
    frames: ShardFrames, views: DrawnViews | None, size: tuple[int, int]
) -> list[NDArray[np.generic]]:
    """Read what a teacher sees of all given records, as `read_inputs` does, for another process."""
    return [values.numpy() for values in read_inputs(frames, views, size, 0, len(frames))]


def draw_random(
    config: ViewsConfig, augment: AugmentOptions, store: Store, shard: ShardEntry
) -> Views:
    """Draw the views of all records of a shard from `augment.operations`, [n, V]."""
    records = SelectedRecords(store, store.rows_of_shard(store.shards.number_of(shard.name)))
    schedule = schedule_views(
        records, augment, derive_seed(config.seed, "stored views", shard.name)
    )
    sizes = records.sizes()
    drawn = [schedule.views(view, 0, sizes) for view in range(config.count)]
    frames = torch.eye(3).expand(len(sizes), 3, 3)
    whole = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(len(sizes), 4)
    unmoved = Views(frames) if augment.edges == "image" else Views(frames, whole)
    return stack_views([unmoved if views is None else views for views in drawn])


def requested_views(config: PrecomputeConfig, store: Store) -> StoredViews:
    """Plan the stored views that the options of precompute ask for.

    Raises:
        ConfigError: As `plan_stored_views`.
    """
    block = config.annotate.records_per_batch
    return plan_stored_views(
        store, config.views, config.augment, config.split, config.subset, block
    )


def plan_stored_views(
    store: Store,
    config: ViewsConfig,
    augment: AugmentOptions,
    split: str,
    subset: SubsetOptions,
    block: int,
) -> StoredViews:
    """Plan the stored views of a split's selection.

    Args:
        store: Store of the records.
        config: Options of the views.
        augment: Recipe of the views.
        split: Name of the split.
        subset: Selection among its records.
        block: Number of records among which the second ones of mixtures are drawn: the batch size of the pass.

    Raises:
        ConfigError: If there is no such split, the selection asks for more records than a class has, or views would be
            cut from smaller images.
    """
    require(
        not augment.scaled_decoding,
        "augment.scaled_decoding is an option of trainings, and views=... stores what the teacher sees; leave it out",
    )
    selected = select_training_rows(store.index, split, subset)
    starts = store.shards.starts
    numbers = store.index.shards_of(selected)
    return StoredViews(
        config=config,
        augment=augment,
        split=split,
        subset=subset,
        rows=selected,
        shards=numbers[starts[numbers + 1] > starts[numbers]],
        block=block,
        cuts_originals=config.kind == "random"
        and store.has_larger_images
        and augment.shows_windows,
    )
