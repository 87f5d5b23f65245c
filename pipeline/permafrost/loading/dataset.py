"""The records of a store with their stored targets, read by row.

Shape letter: n records.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from permafrost.config.models import Picture
from permafrost.core.batches import Batch, Logits, PixelAugment, Rendering, StoredTargets, TopLogits
from permafrost.core.errors import require
from permafrost.core.records import (
    FEATURES,
    MIXTURE_FIELD,
    MOVE_FIELD,
    PARTNER_FIELD,
    PIXEL_FIELD,
    REST_LOGITS,
    TOP_CLASS,
    TOP_LOGITS,
    VIEW_FIELD,
    VIEW_FIELDS,
    WINDOW_FIELD,
    FieldSpec,
)
from permafrost.loading.decode_threads import DecodeThreads
from permafrost.loading.geometry import center_crop, decode_intermediates
from permafrost.loading.method_cache import MethodCache
from permafrost.loading.mixtures import are_mixtures, mixes_of_pass, mixture_of
from permafrost.loading.random_views import ViewSchedule
from permafrost.loading.recipes import recipe_of_pass
from permafrost.loading.sampler import WINDOW_SHARDS, EpochSlice
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.windows import Views, WindowCutter, stored_views_of, views_of_picture
from permafrost.storage.fetch_ahead import FetchAhead, KnownFile
from permafrost.storage.rooted_paths import cache_limit
from permafrost.store.entries import StoreMismatchError
from permafrost.store.fields import Values
from permafrost.store.frames import InputMemory, decode_mask
from permafrost.store.index import RowNumbers
from permafrost.store.manifest import ROWS_DIGEST
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.record_form import report_damage
from permafrost.store.row_reader import Rows, SelectedRows
from permafrost.store.tars import ShardBytes

logger = logging.getLogger("permafrost.loading")

_CACHED_SHARDS = 32
"""Shards cached per pass, enough for a window of the sampler and the beginning of the next one."""
_KEPT_BYTES = 64 * 2**20
"""Maximum size of a selection's small fields for which the rows of all its shards are kept in memory, and default of
its decoded inputs for which these are kept."""
_OPEN_SHARDS = 64
"""Maximum number of open files, far below the limit of a process."""
_ALWAYS_READ = (
    "logits",
    TOP_LOGITS,
    TOP_CLASS,
    REST_LOGITS,
    "map",
    "target_class",
    *VIEW_FIELDS,
)
"""Fields of a pass that are always read. Fields of other outputs are read on request."""
_MAP_FIELDS = ("map", "target_class", FEATURES)
"""Beginnings of the names of fields that a negative control reads in another view."""
_SECOND_FIELDS = (VIEW_FIELD.name, WINDOW_FIELD.name, MOVE_FIELD.name, PIXEL_FIELD)
"""Fields of the second record of a stored mixture."""
_MAX_SEPARATE_SHARE = 0.25
"""Maximum fraction of a shard's records for which a selection that is read once requests each separately."""
_SMALL_FILE = 4096
"""Mean size of a batch's files in bytes below which they are decoded in the calling thread. For images of 32 pixels,
of 1 kB, threads would mostly wait for Python's lock: two are not faster than one."""
Columns = dict[str, NDArray[Any]]
"""Columns of the index for the records of a batch, the numbers of their shards, and their rows in these."""
_INDEX_COLUMNS = (
    "offset",
    "size",
    "mask_offset",
    "mask_size",
    "group",
    "height",
    "width",
    "image_crc32c",
    "mask_crc32c",
    "label",  # also where labels do not apply, so that classes that contradict them are noticed
)


def _uncovered_rows(selected: SelectedRecords, teacher: TeacherPass) -> Iterator[NDArray[np.int64]]:
    """Iterate over the selected rows that a pass does not cover, shard by shard."""
    store = selected.store
    for number in store.index.shards_of(selected.rows).tolist():
        entry = store.shards[number]
        if not teacher.covers_shard(entry):
            rows = selected.rows_in_shard(number)
            yield rows[teacher.rows_of(entry)[rows] < 0] + store.rows_of_shard(number).start


def _uncovered(selected: SelectedRecords, teacher: TeacherPass) -> tuple[int, str]:
    """Count the selected records that a pass does not cover, and return the key of the first one."""
    missing, first = 0, ""
    for rows in _uncovered_rows(selected, teacher):
        if len(rows) and not missing:
            (first,) = selected.store.index.keys(rows[:1])
        missing += len(rows)
    return missing, first


def covered_rows(store: Store, rows: RowNumbers, teacher: TeacherPass) -> NDArray[np.int64]:
    """Return the rows, of ascending ones, that a pass covers."""
    lacking = list(_uncovered_rows(SelectedRecords(store, rows), teacher))
    return np.setdiff1d(np.asarray(rows), np.concatenate(lacking) if lacking else [])


def rows_with_targets(store: Store, rows: RowNumbers, passes: Sequence[TeacherPass]) -> RowNumbers:
    """Return the rows that have targets in all passes, with a warning if there are others.

    Only targets of another tool, ingested with `missing=`, may lack records. Passes of a subset are left as they are.

    Args:
        store: Store of the rows.
        rows: Selected rows, ascending.
        passes: Passes to train on.

    Raises:
        StoreMismatchError: If no row has targets.
    """
    partial = [teacher for teacher in passes if ROWS_DIGEST in (teacher.manifest.selection or {})]
    if not partial:
        return rows
    selected = SelectedRecords(store, rows)
    lacking = [part for teacher in partial for part in _uncovered_rows(selected, teacher)]
    if not any(map(len, lacking)):
        return rows
    with_targets = np.setdiff1d(np.asarray(rows), np.concatenate(lacking))
    names = " and ".join(teacher.name for teacher in partial)
    require(
        len(with_targets) > 0,
        f"{names} has no target of the {len(rows)} records; set split= to one that has",
        StoreMismatchError,
    )
    logger.warning(
        "%s has no targets of %d of the %d records, so the student is trained on the other %d",
        names,
        len(rows) - len(with_targets),
        len(rows),
        len(with_targets),
    )
    return with_targets


def covering_passes(
    store: Store, rows: RowNumbers, passes: Sequence[TeacherPass]
) -> list[TeacherPass]:
    """Return the passes that cover all of these rows of a store.

    Passes of precompute cover all records. Those of another tool's targets may be of some splits alone.

    Args:
        store: The store.
        rows: Row numbers of records in its index.
        passes: Passes of the store.
    """
    selected = SelectedRecords(store, rows)
    return [
        teacher
        for teacher in passes
        if not teacher.is_partial or not _uncovered(selected, teacher)[0]
    ]


class StoreDataset(SelectedRecords, Dataset[Batch]):
    """Selection of a store's records that reads and collates a list of positions at once.

    Files are opened on first use, so each loader process opens its own.
    """

    _schedule: ViewSchedule | None = None
    """Schedule of new views; None for stored ones and for whole frames."""
    _cutter: WindowCutter | None = None
    """Cuts windows of original images; None where views are sampled from frames."""
    _rendering: Rendering = Rendering()
    picture: Picture | None = None
    """Picture of a network in which images are read; None for whole frames and for views."""

    def __init__(
        self,
        store: Store,
        rows: RowNumbers,
        passes: Sequence[TeacherPass] = (),
        *,
        with_regions: bool = False,
        num_classes: int | None = None,
        output: str | Sequence[Sequence[str]] | None = None,
        decode_threads: int = 1,
        keep_bytes: int = _KEPT_BYTES,
        blanks_maps: bool = False,
        still_maps: bool = False,
        scaled_maps: bool = False,
    ) -> None:
        """Select rows of a store's index: a range where possible, which needs no memory, or any row numbers.

        Args:
            store: Store of the records.
            rows: Rows of the index; a position of the data set is a place among them.
            passes: Teacher passes whose stored targets are read with the records.
            with_regions: Also read masks and boxes, for evaluation. It has no effect on a table.
            num_classes: Number of outputs of the network that uses the labels, None for the classes of the data.
            output: Output, or those of each pass, to read besides logits and maps (attention, class_maps, pooled).
            decode_threads: Number of threads that decode a batch, in each process that loads batches.
            blanks_maps: True if maps of replayed views are 0 where an erasing has set the pixels.
            still_maps: True if maps and features of replayed views are those of the record's first stored view.
            scaled_maps: Also read the scale of maps.
            keep_bytes: Maximum total bytes of decoded inputs to decode each once and keep it in memory.

        Raises:
            StoreMismatchError: If a pass does not cover every record of the selection.
            ConfigError: If the cache of a bucket is too small for the shards that an epoch needs at once.
        """
        classes = {teacher.num_classes for teacher in passes if teacher.manifest.has_logits}
        classes |= {num_classes} if num_classes else set()
        super().__init__(store, rows, labels_apply=not classes - {len(store.manifest.classes)})
        self.passes = tuple(passes)
        self.with_regions = with_regions and store.form.has_places
        self.decode_threads = DecodeThreads(decode_threads)
        self.keep_bytes = keep_bytes
        if output is None or isinstance(output, str):
            output = [(output,) if output else ()] * len(self.passes)
        self.intermediate_fields = [
            [name for each_name in names for name in teacher.fields_of(each_name)]
            for teacher, names in zip(self.passes, output, strict=True)
        ]
        for teacher in self.passes:
            self._require_covered(teacher)
        self._blanks_maps, self._scaled_maps = blanks_maps, scaled_maps
        self._first_view_fields = _MAP_FIELDS if still_maps else ()
        self._recipe = recipe_of_pass(self.passes[0]) if self.passes else None
        self._is_mixed = bool(self.passes) and mixes_of_pass(self.passes[0])
        _check_room(store, self.passes)
        self._start_caches()

    def in_views(
        self, schedule: ViewSchedule | None, size: tuple[int, int] | None = None
    ) -> StoreDataset:
        """Return these records in random or in stored views, for slices of epochs.

        Args:
            schedule: Schedule of new views; None to replay those of the passes.
            size: (height, width) of windows that are cut from original images; None for that of the frame.
        """
        other = copy(self)
        stored = self.passes[0].views if self.passes and schedule is None else {}
        other._schedule = schedule
        cuts = stored.get("pixels") == "originals" if schedule is None else schedule.whole_pixels
        other._rendering = Rendering.of(stored) if schedule is None else schedule.rendering
        scaled = schedule is not None and schedule.config.scaled_decoding
        cutter = WindowCutter(size or self.store.size, other._rendering.border, scaled=scaled)
        other._cutter = cutter if cuts else None
        other._start_caches()
        return other

    def in_picture(self, picture: Picture | None) -> StoreDataset:
        """Return these records in the picture of a network, or for None in whole frames."""
        other = copy(self)
        other.picture = picture if self.store.form.has_places else None
        shown = other.picture or Picture(size=self.store.size, frames=self.store.size)
        other._rendering = Rendering(resize=shown.resize)
        other._cutter = WindowCutter(shown.size, "black") if shown.frames is None else None
        if self._cutter is not other._cutter:
            other._start_caches()
        return other

    @property
    def fetch(self) -> Callable[[NDArray[np.int64]], None] | None:
        """Function that downloads shards by their numbers in the background; None for a local store."""
        return None if self._ahead is None else self._fetch_shards

    def _require_covered(self, teacher: TeacherPass) -> None:
        """Raise StoreMismatchError unless a pass covers every record of the selection."""
        if not teacher.is_partial:
            return
        require(
            not mixes_of_pass(teacher) or teacher.shards.num_rows == len(self.rows),
            f"the stored views of {teacher.folder} are mixtures of {teacher.shards.num_rows} records, and this "
            f"selection has {len(self.rows)}; set the split and subset options of that pass, so that no record is "
            "shown that is not selected",
            StoreMismatchError,
        )
        missing, first = _uncovered(self, teacher)
        if missing:
            raise StoreMismatchError(
                f"{teacher.folder} does not cover {missing} of the run's {len(self.rows)} records, the first "
                f"{first}; "
                + (
                    "select the records that have targets, with select(keys=...)"
                    if ROWS_DIGEST in (teacher.manifest.selection or {})
                    else "run permafrost precompute with its teacher, and with this run's split and subset options"
                )
            )

    def _start_caches(self) -> None:
        # Open files stay in the cache of a bucket, whose limit has room for two windows.
        self._ahead = FetchAhead.of(self.store.folder)
        window = -(-self.least_window * len(self.store.shards) // max(len(self), 1))
        most_open = max(window, _OPEN_SHARDS if self._ahead is None else WINDOW_SHARDS)
        self._bytes = MethodCache(self._open_shard, most_open)
        per_pass = max(_CACHED_SHARDS, 2 * window)
        record_bytes = sum(  # of all fields, over all views
            sum(map(_bytes_of, teacher.manifest.fields)) * teacher.num_views
            for teacher in self.passes
        )
        if record_bytes * len(self.rows) <= _KEPT_BYTES:
            per_pass = len(self.store.shards)
        most = per_pass * max(1, len(self.passes))
        self._stored_rows = MethodCache(self._open_stored_rows, most)
        self._values = MethodCache(self._open_values, most)
        images = self._cutter is not None
        size = self._image_bytes() if images else self.store.form.record_bytes * len(self)
        self._keeps = size <= self.keep_bytes
        keeps_frames = self._keeps and not images
        self._kept = InputMemory(self.store.form, len(self)) if keeps_frames else None
        self._is_kept = np.zeros(len(self) if keeps_frames else 0, bool)
        if self._cutter is not None:
            self._cutter.keep(len(self) if self._keeps else 0)

    def _image_bytes(self) -> int:
        """Return the size of all decoded images in bytes, or a part of it that is more than is kept."""
        total = 0
        for rows in self._blocks():
            sizes = self.store.index.take(("height", "width"), rows)
            total += 3 * int((sizes["height"].astype(np.int64) * sizes["width"]).sum())
            if total > self.keep_bytes:
                break
        return total

    @property
    def record_bytes(self) -> int:
        """Size of one record of a batch in bytes: its decoded input and the stored values that are read."""
        read = [
            spec
            for number, teacher in enumerate(self.passes)
            for spec in teacher.manifest.fields
            if spec.name in self._wanted_fields(number)
        ]
        inputs = 2 if self._is_mixed else 1
        cutter = self._cutter
        input_bytes = self.store.form.record_bytes if cutter is None else 3 * math.prod(cutter.size)
        return inputs * input_bytes + sum(map(_bytes_of, read))

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: EpochSlice | Sequence[int | tuple[int, int]]) -> Batch:
        """Load the records at these positions of the selection as one batch.

        Args:
            positions: Slice of an epoch, in the views of `in_views`, or positions in the canonical frame, or pairs of
                a position and the stored view to replay.

        Raises:
            ConfigError: If there is no position, or one is not an integer from 0 to the number of records.
        """
        if isinstance(positions, EpochSlice):
            return self._load(self._checked(positions.positions)[:, 0], positions.views, positions)
        pairs = self._checked(positions)
        return self._load(pairs[:, 0], pairs[:, 1] if pairs.shape[1] == 2 else None)

    def _checked(
        self, positions: NDArray[np.int64] | Sequence[int | tuple[int, int]]
    ) -> NDArray[np.int64]:
        """Return positions, [n, 1], or pairs, [n, 2]. Raises ConfigError for those that no record has."""
        count = len(self)
        require(len(positions) > 0, "a batch of no positions has no records; correct the sampler")
        pairs = np.asarray(positions).reshape(len(positions), -1)
        at = pairs[:, 0]
        wrong = at[(at < 0) | (at >= count)] if np.issubdtype(at.dtype, np.integer) else at
        require(
            not len(wrong),
            f"position {wrong[:1].tolist()[0] if len(wrong) else ''} of a batch is not an integer from 0 to "
            f"{count - 1}, the positions of the selected records; correct the sampler",
        )
        return pairs

    def _load(
        self,
        at: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        epoch_slice: EpochSlice | None = None,
        *,
        is_second: bool = False,
    ) -> Batch:
        """Load records at these positions, in stored views, in those of an epoch, or in the canonical frame.

        Args:
            at: Positions.
            views: Number of the stored view of each record; None without stored views.
            epoch_slice: Places in an epoch, of which new views are drawn; None for the canonical frame.
            is_second: True for second records of mixtures, which have neither targets nor second ones themselves.
        """
        rows = self.rows_at(at)
        columns, keys = self._columns(_INDEX_COLUMNS, rows), self.store.index.keys(rows)
        names = _SECOND_FIELDS if is_second else None
        read = range(1 if is_second else len(self.passes))
        values = [self._gather(number, columns, views, names) for number in read]
        sizes = torch.from_numpy(np.stack([columns["height"], columns["width"]], axis=1)).float()
        shown, pixel_augment, second = None, None, None
        if self.picture is not None:
            shown = views_of_picture(self.picture, sizes)
        elif epoch_slice is not None and self._schedule is not None:
            shown = self._schedule.views(epoch_slice.epoch, epoch_slice.first, sizes)
        if views is not None:  # all passes of a run have the same views
            where = str(self.passes[0].folder)
            shown = stored_views_of(values[0], self._recipe, sizes, self.store.size, where, keys)
            pixel_augment = self._stored_augment(values[0], is_second=is_second)
        if pixel_augment is not None and pixel_augment.mixture is not None:
            second = self._load(self._partners(values[0], columns), views, is_second=True)
        inputs, has_windows = self._images(at, columns, keys, shown, sizes)
        return Batch(
            keys=tuple(keys),
            record_index=torch.from_numpy(at),
            inputs=inputs,
            canonical_from_view=None if shown is None else shown.canonical_from_view,
            moves=None if shown is None else shown.moves,
            has_windows=has_windows,
            rendering=self._rendering,
            pixel_augment=pixel_augment,
            second=second,
            view_index=torch.full((len(at),), -1) if views is None else torch.from_numpy(views),
            original_size=sizes,
            labels=self.labels_at(at),
            groups=torch.from_numpy(columns["group"].astype(np.int64)),
            masks=self._masks(columns, keys) if self.with_regions else None,
            boxes=self._boxes(rows) if self.with_regions else (),
            targets=()
            if is_second
            else tuple(
                self._targets(number, of_teacher, columns, replayed=views is not None)
                for number, of_teacher in enumerate(values)
            ),
        )

    def _columns(self, names: tuple[str, ...], rows: NDArray[np.int64]) -> Columns:
        """Read columns of the index, the numbers of the shards, and the rows in these."""
        columns = self.store.index.take(names, rows)
        columns["shard"] = self.store.index.shard_numbers(rows)
        columns["row"] = rows - self.store.shards.starts[columns["shard"]]
        return columns

    def _stored_augment(self, values: Values, *, is_second: bool) -> PixelAugment | None:
        """Return the changes of the pixels of stored views, and their mixtures; None without either."""
        augment = None
        if self._recipe is not None and self._recipe.width:
            pixels = torch.from_numpy(values[PIXEL_FIELD])
            changes = self._recipe.changes(pixels, blanks_maps=self._blanks_maps)
            augment = PixelAugment(changes=changes)
        if self._is_mixed and not is_second:
            mixtures = values[MIXTURE_FIELD.name]
            mixture = mixture_of(mixtures, torch.arange(len(mixtures)))
            augment = replace(augment or PixelAugment(), mixture=mixture)
        return augment

    def _partners(self, values: Values, columns: Columns) -> NDArray[np.int64]:
        """Return the positions of the second records of stored mixtures.

        Raises:
            StoreMismatchError: If one is not a selected record of the shard, or a share or box is invalid.
        """
        starts, partners = self.store.shards.starts, values[PARTNER_FIELD.name][:, 0]
        rows = starts[columns["shard"]] + partners
        at = self.find_rows(rows)
        in_shard = (partners >= 0) & (rows < starts[columns["shard"] + 1])
        require(
            bool((in_shard & (at >= 0) & are_mixtures(values[MIXTURE_FIELD.name])).all()),
            f"{self.passes[0].folder} has mixtures with invalid shares or with records outside of the selection; "
            "run permafrost verify",
            StoreMismatchError,
        )
        return at

    def intermediates_at(self, at: NDArray[np.int64]) -> list[dict[str, torch.Tensor]]:
        """Read the intermediates of every pass for these positions, in the first stored view, without images.

        Returns:
            The fields of each pass by name, f32 [n, ...] in their units.
        """
        columns = self._columns(("height", "width"), self.rows_at(at))
        return [
            decode_intermediates(
                self._targets(number, self._gather(number, columns, None), columns, replayed=False)
            )
            for number in range(len(self.passes))
        ]

    def _inputs(self, at: NDArray[np.int64], columns: Columns, keys: Sequence[str]) -> InputMemory:
        """Decode images or rows of a table, each record once even if it occurs several times.

        A selection that is small as a whole is decoded once for all epochs.
        """
        _, first, place = np.unique(at, return_index=True, return_inverse=True)
        if self._kept is not None:
            first = first[~self._is_kept[at[first]]]
            self._decode(self._kept, at[first], first, columns, keys)
            self._is_kept[at[first]] = True
            return self._kept.take(at)
        inputs = InputMemory(self.store.form, len(at))
        self._decode(inputs, first, first, columns, keys)
        if len(first) < len(at):
            again = np.setdiff1d(np.arange(len(at)), first)
            inputs.repeat(again, first[place[again]])
        return inputs

    def _decode(
        self,
        inputs: InputMemory,
        slots: NDArray[np.int64],
        numbers: NDArray[np.int64],
        columns: Columns,
        keys: Sequence[str],
    ) -> None:
        """Decode records into `slots` of the memory; `numbers` are their rows of the columns and keys."""

        self._read(
            columns,
            keys,
            numbers,
            lambda number, data, where: inputs.decode(slots[number], data, where),
        )

    def _images(
        self,
        at: NDArray[np.int64],
        columns: Columns,
        keys: Sequence[str],
        views: Views | None,
        sizes: torch.Tensor,
    ) -> tuple[torch.Tensor, bool]:
        """Return the windows of views and True, or whole frames, or rows of a table, and False."""
        if self._cutter is None or views is None or views.windows is None:
            return self._inputs(at, columns, keys).tensor(), False
        return self._cutter.cut(at, views.windows, sizes, partial(self._read, columns, keys)), True

    def _read(
        self,
        columns: Columns,
        keys: Sequence[str],
        numbers: NDArray[np.int64],
        use: Callable[[int, bytes, str], None],
    ) -> None:
        """Read the bytes of records and use each in one of the threads.

        Args:
            columns: Columns of the index.
            keys: Keys.
            numbers: Rows of the columns and keys.
            use: Function of the place among the numbers, the bytes, and the file and record for messages.
        """
        names = ("shard", "offset", "size", "image_crc32c")
        lists = (columns[name][numbers].tolist() for name in names)
        records = list(zip(numbers, *lists, strict=True))

        def read(number: int) -> None:
            row, shard, offset, size, crc32c = records[number]
            file, key = self._bytes(shard), keys[row]
            use(number, file.read(offset, size, crc32c, key), f"{file.path}: {key}")

        if records and columns["size"][numbers].mean() < _SMALL_FILE:
            for number in range(len(records)):
                read(number)
            return
        for _, shard, offset, size, _ in records:
            self._bytes(shard).will_read(offset, size)
        self.decode_threads.run(read, len(records))

    def _targets(
        self, number: int, values: Values, columns: Columns, *, replayed: bool
    ) -> StoredTargets:
        teacher, names = self.passes[number], self.intermediate_fields[number]
        targets = StoredTargets(
            teacher=teacher.name,
            logits=_logits_of(teacher, values),
            intermediates={name: torch.from_numpy(values[name]) for name in names},
            scales={
                name: torch.from_numpy(values[f"{name}_scale"])
                for name in names
                if f"{name}_scale" in values
            },
            specs={spec.name: spec for spec in teacher.manifest.fields if spec.name in names},
        )
        spatial = [spec for spec in teacher.manifest.fields if spec.frame is not None]
        if spatial and not replayed:  # all fields of a teacher have the same frame
            targets = replace(
                targets, map_from_canonical=self._map_from_canonical(spatial[0], columns)
            )
        if "map" not in values:
            return targets
        return replace(
            targets,
            target_class=torch.from_numpy(values["target_class"].astype(np.int64)),
            maps=torch.from_numpy(values["map"]),
            map_scale=torch.from_numpy(values["map_scale"]) if "map_scale" in values else None,
        )

    def _map_from_canonical(self, spec: FieldSpec, columns: Columns) -> torch.Tensor:
        """Transform of each map's grid in its canonical frame: f32 [n, 3, 3]."""
        if spec.frame != "center_crop":
            return torch.eye(3, dtype=torch.float32).repeat(len(columns["height"]), 1, 1)
        assert spec.crop_fraction is not None
        heights, widths = (torch.from_numpy(columns[name]).float() for name in ("height", "width"))
        map_from_canonical: torch.Tensor = torch.linalg.inv(
            center_crop(heights, widths, spec.crop_fraction)
        )
        return map_from_canonical

    def _gather(
        self,
        number: int,
        columns: Columns,
        views: NDArray[np.int64] | None,
        names: Sequence[str] | None = None,
    ) -> Values:
        """Read fields [n, *shape] of the given views (None for the canonical one), in the order of the columns.

        Args:
            number: Number of the pass.
            columns: Columns of the records.
            views: Number of the view of each record.
            names: Names of the fields, None for all that are read from the pass.
        """
        shards, rows = columns["shard"], columns["row"]
        first = np.zeros(len(rows), np.int64)
        views = first if views is None else views
        gathered: Values = {}
        for shard in np.unique(shards).tolist():
            here = shards == shard
            stored = self._stored_rows(number, shard)
            places = rows[here] if stored is None else stored[rows[here]]
            for name, array in self._values(number, shard).items():
                if names is not None and name not in names:
                    continue
                if name not in gathered:
                    gathered[name] = np.empty((len(rows), *array.shape[2:]), array.dtype)
                read = first if name.startswith(self._first_view_fields) else views
                gathered[name][here] = array[places, read[here]]
        return gathered

    def _masks(self, columns: Columns, keys: Sequence[str]) -> torch.Tensor:
        """Read masks u8 [n, 1, H, W], all background for records without a mask."""
        masks = torch.zeros(len(keys), 1, *self.store.size, dtype=torch.uint8)
        names = ("shard", "mask_offset", "mask_size", "mask_crc32c")
        places = zip(masks, keys, *(columns[name].tolist() for name in names), strict=True)
        for mask, key, shard, offset, size, crc32c in places:
            if offset >= 0:
                file = self._bytes(shard)
                data = file.read(offset, size, crc32c, key)
                with report_damage(f"{file.path}: {key}: the mask"):
                    mask[:] = decode_mask(data, self.store.size)
        return masks

    def _boxes(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        boxes, lengths = self.store.index.boxes(rows)
        return torch.split(torch.from_numpy(boxes), lengths.tolist())

    def _open_shard(self, shard: int) -> ShardBytes:
        entry = self.store.shards[shard]
        return ShardBytes(self.store.folder, entry, reads_ranges=self._reads_ranges(shard))

    def _reads_ranges(self, shard: int) -> bool:
        """Return whether few of a shard's records are read, each once, so that it is not worth a download."""
        if not self._keeps or self._ahead is None:
            return False
        records = self.store.rows_of_shard(shard)
        return len(self.rows_in_shard(shard)) <= _MAX_SEPARATE_SHARE * len(records)

    def _fetch_shards(self, shards: NDArray[np.int64]) -> None:
        """Have the files of shards downloaded to the node's cache in the background."""
        assert self._ahead is not None
        self._ahead.ask(file for shard in shards.tolist() for file in self._files_of(shard))

    def _files_of(self, shard: int) -> Iterator[KnownFile]:
        """Iterate over the files that records of a shard are read from and that the cache does not have in memory."""
        entry = self.store.shards[shard]
        file = entry.file(self.store.folder)
        if not self._reads_ranges(shard):
            yield KnownFile(file, entry.sha256)
        for number, each in enumerate(self.passes):
            requested, teacher = self._wanted_fields(number), each.pass_of_shard(entry)
            position = teacher.shards.number_of(entry.name)
            names = teacher.fields.files_of_fields(requested, position, entry.name)
            yield from (
                KnownFile(teacher.folder / stored.path, stored.sha256)
                for stored in (() if position < 0 else teacher.shards[position].files)
                if stored.path in names
            )

    def _wanted_fields(self, number: int) -> set[str]:
        """Return the names of the fields that are read from a pass."""
        names = self.intermediate_fields[number]
        scaled = [*names, "map"] if self._scaled_maps else names
        return {*_ALWAYS_READ, *names, *(f"{name}_scale" for name in scaled)}

    def _open_values(self, number: int, shard: int) -> dict[str, Rows]:
        """Open a shard's fields: large ones stay on disk, of the others only this selection's rows are kept."""
        requested = self._wanted_fields(number)
        fields = self.passes[number].open_shard(self.store.shards[shard], requested)
        stored, needed = self._stored_rows(number, shard), self.rows_in_shard(shard)
        if stored is not None:
            needed = np.unique(stored[needed])
        return {
            name: SelectedRows(rows, needed)
            if isinstance(rows, np.ndarray) and len(needed) < len(rows)
            else rows
            for name, rows in fields.items()
        }

    def _open_stored_rows(self, number: int, shard: int) -> NDArray[np.int64] | None:
        """Row in a pass of each of a shard's records; None if the pass has the shard's own rows."""
        teacher = self.passes[number]
        return teacher.rows_of(self.store.shards[shard]) if teacher.is_partial else None

    def __getstate__(self) -> dict[str, Any]:
        # A loader process receives paths and the selection; it maps the index and opens files itself.
        opened = (
            "_bytes",
            "_values",
            "_stored_rows",
            "_kept",
            "_is_kept",
            "_ahead",
            "label_numbers",
        )
        return {name: value for name, value in self.__dict__.items() if name not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()


def _bytes_of(spec: FieldSpec) -> int:
    """Size of a field of one record and view in bytes."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def iter_batches(
    dataset: StoreDataset, batch_size: int, positions: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Iterate over batches in whole frames.

    Args:
        dataset: Selection of records.
        batch_size: Number of records of a batch; the last one may be smaller.
        positions: Positions to read, in this order; None reads every record of the selection once.
    """
    chosen = range(len(dataset)) if positions is None else positions
    yield from (
        dataset.__getitems__(list(chosen[start : start + batch_size]))
        for start in range(0, len(chosen), batch_size)
    )


def _logits_of(teacher: TeacherPass, values: Values) -> Logits | None:
    if not teacher.manifest.has_logits:
        return None
    if not teacher.manifest.temperatures:
        return torch.from_numpy(values["logits"].astype(np.float32))
    return TopLogits(
        values=torch.from_numpy(values[TOP_LOGITS].astype(np.float32)),
        classes=torch.from_numpy(values[TOP_CLASS].astype(np.int64)),
        rest=torch.from_numpy(values[REST_LOGITS]),
        temperatures=teacher.manifest.temperatures,
        num_classes=teacher.num_classes,
    )


def _check_room(store: Store, passes: Sequence[TeacherPass]) -> None:
    """Raise ConfigError if the cache is smaller than the shards of the two windows that an epoch needs at once."""
    if (limit := cache_limit(store.folder)) is None:
        return
    largest = max(store.shards.table["bytes"].to_pylist(), default=0)
    for teacher in passes:
        largest += max(
            (sum(file.bytes for file in shard.files) for shard in teacher.shards), default=0
        )
    shards = min(2 * WINDOW_SHARDS + 1, len(store.shards))
    index = sum(file.bytes for file in store.manifest.index.values())
    needed = shards * largest + index
    require(
        limit >= needed,
        f"store.cache_bytes={limit} must be >= {needed}: an epoch reads {WINDOW_SHARDS} shards at once and fetches "
        f"the next {WINDOW_SHARDS}, of up to {largest:,} bytes each, in addition to the index of {index:,} bytes; "
        "raise it",
    )
