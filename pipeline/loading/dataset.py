"""Random access to a selection of a store's records by offset, where a list of positions is one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pipeline.core.labels import multi_hot_of_lists
from pipeline.core.records import NO_LABEL, VIEW_FIELD, Batch, FieldSpec, StoredTargets
from pipeline.loading.geometry import center_crop
from pipeline.store.codecs import decode_unit
from pipeline.store.fields import Values
from pipeline.store.frames import decode_input, decode_mask
from pipeline.store.manifest import StoreMismatchError
from pipeline.store.reader import Store, TeacherPass
from pipeline.store.row_reader import Rows, SelectedRows
from pipeline.store.tars import ShardBytes

_CACHED_SHARDS = 32
"""Shards cached per pass, enough for a window of the sampler and the beginning of the next one."""
_KEPT_BYTES = 64 * 2**20
"""Maximum size of a selection's small fields for which the rows of all its shards are kept in memory."""
_OPEN_SHARDS = 64
"""Maximum number of open files, far below the limit of a process."""
_ALWAYS_READ = ("logits", "map", "explained_class", VIEW_FIELD.name)
"""Fields of a pass that are always read. Fields of other payloads are read on request."""
_INDEX_COLUMNS = (
    "offset",
    "size",
    "mask_offset",
    "mask_size",
    "label",
    "group",
    "row",
    "height",
    "width",
    "image_crc32c",
    "mask_crc32c",
)


class StoreDataset(Dataset[Batch]):
    """A selection of a store's records, from which a list of positions is read and collated at once.

    Files are opened on first use, so each loader process opens its own.
    """

    def __init__(
        self,
        store: Store,
        rows: NDArray[np.int64],
        passes: Sequence[TeacherPass] = (),
        *,
        with_regions: bool = False,
        num_classes: int | None = None,
        payload: str | None = None,
    ) -> None:
        """Select rows of a store's index.

        with_regions  also read masks and boxes, for evaluation
        num_classes   number of outputs of the network that uses the labels, None for the classes of the data
        payload       payload (attention, class_maps, pooled, superfeature_logits) to read in addition to logits and
                      maps; others are not read
        """
        self.store = store
        self.rows = rows
        self.passes = tuple(passes)
        self.with_regions = with_regions
        self.intermediate_fields = [t.fields_of(payload) if payload else [] for t in self.passes]
        index = store.index
        self.columns: dict[str, NDArray[Any]] = {
            name: index[name].to_numpy()[rows] for name in _INDEX_COLUMNS
        }
        self.label_lists = index["labels"].take(rows) if store.manifest.multi_label else None
        outputs = {t.num_classes for t in self.passes} | ({num_classes} if num_classes else set())
        if outputs - {len(store.manifest.classes)}:
            # The teacher's classes are not those of the data, so labels have no meaning for its student.
            self.columns["label"] = np.full(len(rows), NO_LABEL)
            self.label_lists = None
        self.keys = index["key"].take(rows)
        starts = np.asarray(list(store.first_rows.values()))
        self.shard = np.searchsorted(starts, rows, side="right") - 1
        self.pass_rows = [self._pass_rows(teacher) for teacher in self.passes]
        self._start_caches()

    def _pass_rows(self, teacher: TeacherPass) -> NDArray[np.int64]:
        """Row of each record in its shard of a pass, [n]."""
        if teacher.manifest.selection is None:
            return self.columns["row"]
        rows = np.empty(len(self.rows), np.int64)
        for number in np.unique(self.shard):
            here = self.shard == number
            entry = self.store.manifest.shards[number]
            rows[here] = teacher.rows_of(entry)[self.columns["row"][here]]
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise StoreMismatchError(
                f"{teacher.folder} does not cover {len(missing)} of the run's {len(rows)} records, the first "
                f"{self.keys[missing[0]]}; run permafrost precompute with this run's split and subset options"
            )
        return rows

    def _start_caches(self) -> None:
        self._bytes = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        per_pass = _CACHED_SHARDS
        if sum(map(self._field_bytes, self.passes)) * len(self.rows) <= _KEPT_BYTES:
            per_pass = len(self.store.manifest.shards)
        self._values = lru_cache(maxsize=per_pass * max(1, len(self.passes)))(self._open_values)

    @staticmethod
    def _field_bytes(teacher: TeacherPass) -> int:
        """Size of the fields of one record in bytes, over all views."""
        fields = teacher.manifest.fields
        values = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in fields)
        return values * teacher.num_views

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def aspects(self) -> torch.Tensor:
        """Width / height of every record's original image, f64 [n], 1 for rows of a table."""
        return torch.from_numpy(self.columns["width"] / self.columns["height"])

    @property
    def has_many_labels(self) -> bool:
        """True if records have many labels, so that labels of a batch are f32 [B, K]."""
        return self.label_lists is not None

    @property
    def has_labels(self) -> bool:
        """True if any record has a label among the classes of the network."""
        if self.label_lists is not None:
            return any(self.label_lists.to_pylist())
        return bool((self.columns["label"] != NO_LABEL).any())

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int | tuple[int, int]]) -> Batch:
        """Load the records at these positions of the selection as one batch.

        positions  positions (no view is drawn yet), or pairs of a position and the stored view to replay
        """
        pairs = np.asarray(positions).reshape(len(positions), -1)
        at = pairs[:, 0]
        views = pairs[:, 1] if pairs.shape[1] == 2 else None
        values = [self._gather(number, at, views) for number in range(len(self.passes))]
        canonical_from_view = None
        if views is not None:  # all passes of a run have the same views
            canonical_from_view = torch.from_numpy(values[0][VIEW_FIELD.name])
        keys: list[str] = self.keys.take(at).to_pylist()
        return Batch(
            keys=tuple(keys),
            record_index=torch.from_numpy(at),
            inputs=self._inputs(at, keys),
            canonical_from_view=canonical_from_view,
            view_index=torch.full((len(at),), -1) if views is None else torch.from_numpy(views),
            original_size=torch.from_numpy(
                np.stack([self.columns["height"][at], self.columns["width"][at]], axis=1)
            ).float(),
            labels=self.labels_at(at),
            groups=torch.from_numpy(self.columns["group"][at].astype(np.int64)),
            masks=self._masks(at, keys) if self.with_regions and not self.store.is_table else None,
            boxes=self._boxes(at) if self.with_regions else (),
            targets=tuple(
                self._targets(number, of_teacher, at, replayed=views is not None)
                for number, of_teacher in enumerate(values)
            ),
        )

    def labels_at(self, at: NDArray[np.int64]) -> torch.Tensor:
        """Read the labels of these positions without reading images: i64 [n], or f32 [n, K] for many labels."""
        if self.label_lists is not None:
            lists = self.label_lists.take(at).to_pylist()
            return multi_hot_of_lists(lists, len(self.store.manifest.classes))
        return torch.from_numpy(self.columns["label"][at].astype(np.int64))

    def intermediates_at(self, at: NDArray[np.int64]) -> list[dict[str, torch.Tensor]]:
        """Read the intermediates of every pass for these positions, in the first stored view, but no images."""
        return [
            self._targets(number, self._gather(number, at, None), at, replayed=False).intermediates
            for number in range(len(self.passes))
        ]

    def _inputs(self, at: NDArray[np.int64], keys: Sequence[str]) -> torch.Tensor:
        """Decode frames u8 [n, 3, H, W] or table rows f32 [n, d], each record once even if it occurs several times."""
        once, first, place = np.unique(at, return_index=True, return_inverse=True)
        columns = (self.columns[name][once].tolist() for name in ("offset", "size", "image_crc32c"))
        inputs = []
        places = zip(first, self.shard[once].tolist(), *columns, strict=True)
        for number, shard, offset, size, crc32c in places:
            file, key = self._bytes(shard), keys[number]
            data = file.read(offset, size, crc32c, key)
            inputs.append(decode_input(data, self.store, f"{file.path}: {key}"))
        return torch.stack([inputs[number] for number in place])

    def _targets(
        self, number: int, values: Values, at: NDArray[np.int64], *, replayed: bool
    ) -> StoredTargets:
        teacher = self.passes[number]
        targets = StoredTargets(
            teacher=teacher.name,
            logits=torch.from_numpy(values["logits"].astype(np.float32)),
            intermediates={
                name: _decode(values, name) for name in self.intermediate_fields[number]
            },
            intermediates_are_spatial=all(
                spec.frame is not None
                for spec in teacher.manifest.fields
                if spec.name in self.intermediate_fields[number]
            ),
        )
        spatial = [spec for spec in teacher.manifest.fields if spec.frame is not None]
        if spatial and not replayed:  # all fields of a teacher have the same frame
            targets = replace(targets, map_from_canonical=self._map_from_canonical(spatial[0], at))
        if "map" not in values:
            return targets
        return replace(
            targets,
            explained_class=torch.from_numpy(values["explained_class"].astype(np.int64)),
            maps=torch.from_numpy(decode_unit(values["map"])),
        )

    def _map_from_canonical(self, spec: FieldSpec, at: NDArray[np.int64]) -> torch.Tensor:
        """Transform of each map's grid in its canonical frame: f32 [n, 3, 3]."""
        if spec.frame != "center_crop":
            return torch.eye(3).expand(len(at), 3, 3)
        assert spec.crop_fraction is not None
        heights, widths = (
            torch.from_numpy(self.columns[n][at]).float() for n in ("height", "width")
        )
        map_from_canonical: torch.Tensor = torch.linalg.inv(
            center_crop(heights, widths, spec.crop_fraction)
        )
        return map_from_canonical

    def _gather(
        self, number: int, at: NDArray[np.int64], views: NDArray[np.int64] | None
    ) -> Values:
        """Read fields [n, *shape] of the given views (None for the canonical one), in the order of `at`."""
        shards, rows = self.shard[at], self.pass_rows[number][at]
        views = np.zeros(len(at), np.int64) if views is None else views
        gathered: Values = {}
        for shard in np.unique(shards):
            here = shards == shard
            for name, array in self._values(number, int(shard)).items():
                if name not in gathered:
                    gathered[name] = np.empty((len(at), *array.shape[2:]), array.dtype)
                gathered[name][here] = array[rows[here], views[here]]
        return gathered

    def _masks(self, at: NDArray[np.int64], keys: Sequence[str]) -> torch.Tensor:
        """Read masks u8 [n, 1, H, W], all background for records without a mask."""
        masks = torch.zeros(len(at), 1, *self.store.size, dtype=torch.uint8)
        names = ("mask_offset", "mask_size", "mask_crc32c")
        columns = [self.shard[at].tolist(), *(self.columns[n][at].tolist() for n in names)]
        places = zip(masks, keys, *columns, strict=True)
        for mask, key, shard, offset, size, crc32c in places:
            if offset >= 0:
                data = self._bytes(shard).read(offset, size, crc32c, key)
                mask[:] = decode_mask(data, self.store.size)
        return masks

    def _boxes(self, at: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        names = ("label", "x0", "y0", "x1", "y1")
        boxes = self.store.index["boxes"].take(self.rows[at]).to_pylist()
        return tuple(
            torch.tensor([[box[n] for n in names] for box in b]).reshape(-1, 5) for b in boxes
        )

    def _open_shard(self, shard: int) -> ShardBytes:
        return ShardBytes(self.store.path, self.store.manifest.shards[shard])

    def _open_values(self, number: int, shard: int) -> dict[str, Rows]:
        """Open a shard's fields: large ones stay on disk, of the others only this selection's rows are kept."""
        names = self.intermediate_fields[number]
        wanted = {*_ALWAYS_READ, *names, *(f"{name}_scale" for name in names)}
        fields = self.passes[number].open_shard(self.store.manifest.shards[shard], wanted)
        needed = np.unique(self.pass_rows[number][self.shard == shard])
        return {
            name: SelectedRows(rows, needed)
            if isinstance(rows, np.ndarray) and len(needed) < len(rows)
            else rows
            for name, rows in fields.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        # Each loader process opens its own files.
        return {k: v for k, v in self.__dict__.items() if k not in ("_bytes", "_values")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()


def _decode(values: Values, name: str) -> torch.Tensor:
    """Decode a field [n, *shape] to its units. The scale of a max-abs field has the first dimensions of its shape."""
    if f"{name}_scale" not in values:
        return torch.from_numpy(values[name].astype(np.float32))
    unit, scale = decode_unit(values[name]), values[f"{name}_scale"]
    return torch.from_numpy(unit * scale.reshape(*scale.shape, *[1] * (unit.ndim - scale.ndim)))


def iter_batches(dataset: StoreDataset, batch_size: int) -> Iterator[Batch]:
    """Iterate over batches with every record of the selection exactly once, in whole frames, for evaluation."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.__getitems__(list(range(start, min(start + batch_size, len(dataset)))))
