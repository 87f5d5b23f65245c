"""A selection of a store's records, read at random by offset: a list of positions is one batch."""

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
"""Of each pass: the order's window and the next one's beginning."""
_KEPT_BYTES = 64 * 2**20
"""Of small fields: a selection that needs no more keeps the rows of all its shards, however many these are."""
_OPEN_SHARDS = 64
"""Files held open, far below what a process may have, whatever the number of shards."""
_ALWAYS_READ = ("logits", "map", "explained_class", VIEW_FIELD.name)
"""Of a pass; fields of other payloads are read where they are asked for."""
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
    """A selection of a store's records; a list of positions is read and collated at once.

    Files are opened on first use, so that each loader process has its own.
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
        """with_regions: also read masks and boxes, for evaluation.
        num_classes: outputs of the network that will read the labels; null takes the data's
        payload: the payload (attention, class_maps, pooled, superfeature_logits) to read beside logits and maps; all others stay on disk
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
            # The teacher's classes are not the data's, so no label means anything to its student.
            self.columns["label"] = np.full(len(rows), NO_LABEL)
            self.label_lists = None
        self.keys = index["key"].take(rows)
        starts = np.asarray(list(store.first_rows.values()))
        self.shard = np.searchsorted(starts, rows, side="right") - 1
        self.pass_rows = [self._pass_rows(teacher) for teacher in self.passes]
        self._start_caches()

    def _pass_rows(self, teacher: TeacherPass) -> NDArray[np.int64]:
        """[n]: row of each record in its shard of a pass."""
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
                f"{self.keys[missing[0]]}; run stages.precompute with this run's split and subset options"
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
        """Of one record, all views."""
        fields = teacher.manifest.fields
        values = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in fields)
        return values * teacher.num_views

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def aspects(self) -> torch.Tensor:
        """Width / height of every record's original image, f64 [n]; 1 of a table's row."""
        return torch.from_numpy(self.columns["width"] / self.columns["height"])

    @property
    def has_many_labels(self) -> bool:
        """Whether a batch's labels are f32 [B, K], many a record."""
        return self.label_lists is not None

    @property
    def has_labels(self) -> bool:
        """Whether any record has a label that means something to the network."""
        if self.label_lists is not None:
            return any(self.label_lists.to_pylist())
        return bool((self.columns["label"] != NO_LABEL).any())

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int | tuple[int, int]]) -> Batch:
        """The records at these positions of the selection, as one batch.

        positions  each alone (no view is drawn yet), or with the stored view to replay
        """
        pairs = np.asarray(positions).reshape(len(positions), -1)
        at = pairs[:, 0]
        views = pairs[:, 1] if pairs.shape[1] == 2 else None
        values = [self._gather(number, at, views) for number in range(len(self.passes))]
        canonical_from_view = None
        if views is not None:  # all passes of a run have the same
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
        """Of these positions, without reading an image: i64 [n], or f32 [n, K] of many labels a record."""
        if self.label_lists is not None:
            lists = self.label_lists.take(at).to_pylist()
            return multi_hot_of_lists(lists, len(self.store.manifest.classes))
        return torch.from_numpy(self.columns["label"][at].astype(np.int64))

    def intermediates_at(self, at: NDArray[np.int64]) -> list[dict[str, torch.Tensor]]:
        """Every pass's intermediates of these positions, of the first stored view, without reading an image."""
        return [
            self._targets(number, self._gather(number, at, None), at, replayed=False).intermediates
            for number in range(len(self.passes))
        ]

    def _inputs(self, at: NDArray[np.int64], keys: Sequence[str]) -> torch.Tensor:
        """u8 [n, 3, H, W], of a table f32 [n, d]; a record that comes several times is decoded once."""
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
        if spatial and not replayed:  # of one teacher, whose fields all show the same part
            targets = replace(targets, map_from_canonical=self._map_from_canonical(spatial[0], at))
        if "map" not in values:
            return targets
        return replace(
            targets,
            explained_class=torch.from_numpy(values["explained_class"].astype(np.int64)),
            maps=torch.from_numpy(decode_unit(values["map"])),
        )

    def _map_from_canonical(self, spec: FieldSpec, at: NDArray[np.int64]) -> torch.Tensor:
        """Places each map's grid in its canonical frame: f32 [n, 3, 3]."""
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
        """Fields [n, *shape] of the given views (None: the canonical one), in the order of `at`."""
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
        """u8 [n, 1, H, W]; all background where a record has no mask."""
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
        """A shard's fields: large ones on disk, of the others the rows of this selection."""
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
        # A loader process opens its own files.
        return {k: v for k, v in self.__dict__.items() if k not in ("_bytes", "_values")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()


def _decode(values: Values, name: str) -> torch.Tensor:
    """A field [n, *shape] in its own units; of a max-abs one the scale has the shape's first dimensions."""
    if f"{name}_scale" not in values:
        return torch.from_numpy(values[name].astype(np.float32))
    unit, scale = decode_unit(values[name]), values[f"{name}_scale"]
    return torch.from_numpy(unit * scale.reshape(*scale.shape, *[1] * (unit.ndim - scale.ndim)))


def iter_batches(dataset: StoreDataset, batch_size: int) -> Iterator[Batch]:
    """Every record of the selection exactly once, whole frames, for evaluation."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.__getitems__(list(range(start, min(start + batch_size, len(dataset)))))
