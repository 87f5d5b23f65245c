"""From a store to batches: random access by offset, in an order that is decided elsewhere (order.py)."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.geometry import center_crop
from pipeline.order import EpochOrder, GlobalBatches
from pipeline.records import NO_LABEL, Batch, StoredTargets
from pipeline.store.codecs import decode_unit
from pipeline.store.frames import decode_frame, decode_mask
from pipeline.store.tars import ShardBytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.records import FieldSpec
    from pipeline.store.columns import Values
    from pipeline.store.reader import Store, TeacherPass
    from pipeline.views import ViewSchedule

_CACHED_SHARDS = 32
"""Of each pass: the order's window and the next one's beginning."""
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
    ) -> None:
        """with_regions: also read masks and boxes, for evaluation.
        num_classes: outputs of the network that will read the labels; null takes the data's
        """
        self.store = store
        self.rows = rows
        self.passes = tuple(passes)
        self.with_regions = with_regions
        index = store.index
        self.columns: dict[str, NDArray[Any]] = {
            name: index[name].to_numpy()[rows] for name in _INDEX_COLUMNS
        }
        outputs = {t.num_classes for t in self.passes} | ({num_classes} if num_classes else set())
        if outputs - {len(store.manifest.classes)}:
            # The teacher's classes are not the data's, so no label means anything to its student.
            self.columns["label"] = np.full(len(rows), NO_LABEL)
        self.keys = index["key"].take(rows)
        starts = np.asarray(list(store.first_rows.values()))
        self.shard = np.searchsorted(starts, rows, side="right") - 1
        self._start_caches()

    def _start_caches(self) -> None:
        self._bytes = lru_cache(maxsize=None)(self._open_shard)
        cached = _CACHED_SHARDS * max(1, len(self.passes))
        self._values = lru_cache(maxsize=cached)(self._read_values)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def aspects(self) -> torch.Tensor:
        """Width / height of every record's original image, f64 [n]."""
        return torch.from_numpy(self.columns["width"] / self.columns["height"])

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> Batch:
        """The records at these positions of the selection, as one batch without views."""
        at = np.asarray(positions)
        frames = [
            decode_frame(self._bytes(int(shard)).read(int(offset), int(size)), self.store.size)
            for shard, offset, size in zip(
                self.shard[at], self.columns["offset"][at], self.columns["size"][at], strict=True
            )
        ]
        return Batch(
            keys=tuple(self.keys.take(at).to_pylist()),
            record_index=torch.from_numpy(at),
            inputs=torch.stack(frames),
            canonical_from_view=None,
            view_index=torch.full((len(at),), -1),
            original_size=torch.from_numpy(
                np.stack([self.columns["height"][at], self.columns["width"][at]], axis=1)
            ).float(),
            labels=torch.from_numpy(self.columns["label"][at].astype(np.int64)),
            groups=torch.from_numpy(self.columns["group"][at].astype(np.int64)),
            masks=self._masks(at) if self.with_regions else None,
            boxes=self._boxes(at) if self.with_regions else (),
            targets=tuple(self._targets(number, at) for number in range(len(self.passes))),
        )

    def _targets(self, number: int, at: NDArray[np.int64]) -> StoredTargets:
        values = self._gather(number, at)
        specs = {spec.name: spec for spec in self.passes[number].manifest.fields}
        teacher = self.passes[number].name
        logits = torch.from_numpy(values["logits"].astype(np.float32))
        if "map" not in values:
            return StoredTargets(teacher=teacher, logits=logits)
        return StoredTargets(
            teacher=teacher,
            logits=logits,
            explained_class=torch.from_numpy(values["explained_class"].astype(np.int64)),
            maps=torch.from_numpy(decode_unit(values["map"])),
            map_from_canonical=self._map_from_canonical(specs["map"], at),
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

    def _gather(self, number: int, at: NDArray[np.int64]) -> Values:
        """Fields [n, *shape] of the canonical view, in the order of `at`."""
        shards, rows = self.shard[at], self.columns["row"][at]
        gathered: Values = {}
        for shard in np.unique(shards):
            here = shards == shard
            for name, array in self._values(number, int(shard)).items():
                if name not in gathered:
                    gathered[name] = np.empty((len(at), *array.shape[2:]), array.dtype)
                gathered[name][here] = array[rows[here], 0]
        return gathered

    def _masks(self, at: NDArray[np.int64]) -> torch.Tensor:
        """u8 [n, 1, H, W]; all background where a record has no mask."""
        masks = torch.zeros(len(at), 1, *self.store.size, dtype=torch.uint8)
        columns = (self.shard, self.columns["mask_offset"], self.columns["mask_size"])
        for mask, shard, offset, size in zip(
            masks, *(c[at].tolist() for c in columns), strict=True
        ):
            if offset >= 0:
                mask[:] = decode_mask(self._bytes(shard).read(offset, size), self.store.size)
        return masks

    def _boxes(self, at: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        names = ("label", "x0", "y0", "x1", "y1")
        boxes = self.store.index["boxes"].take(self.rows[at]).to_pylist()
        return tuple(
            torch.tensor([[box[n] for n in names] for box in b]).reshape(-1, 5) for b in boxes
        )

    def _open_shard(self, shard: int) -> ShardBytes:
        return ShardBytes(self.store.path / self.store.manifest.shards[shard].path)

    def _read_values(self, number: int, shard: int) -> Values:
        return self.passes[number].read_shard(self.store.manifest.shards[shard])

    def __getstate__(self) -> dict[str, Any]:
        # A loader process opens its own files.
        return {k: v for k, v in self.__dict__.items() if k not in ("_bytes", "_values")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_caches()


class TrainingStream:
    """An epoch's batches with their views, from any step on."""

    def __init__(
        self,
        dataset: StoreDataset,
        views: ViewSchedule,
        *,
        batch_size: int,
        seed: int,
        loader_processes: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        order = EpochOrder(dataset.shard, seed)
        self.batches = GlobalBatches(order, batch_size, rank=rank, world_size=world_size)
        self.views = views
        self.aspects = dataset.aspects
        self.loader: DataLoader[Batch] = DataLoader(
            dataset,
            batch_sampler=self.batches,
            collate_fn=cast("Any", _same),
            num_workers=loader_processes,
            # A forked process that inherits zarr's event loop can hang.
            multiprocessing_context="spawn" if loader_processes else None,
            persistent_workers=loader_processes > 0,
        )

    @property
    def num_steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.batches.num_steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Batches of the epoch's steps from `first_step` on."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        for step, batch in enumerate(self.loader, start=first_step):
            start = self.batches.first_position(step)
            aspects = self.aspects[batch.record_index]
            yield replace(batch, canonical_from_view=self.views.views(epoch, start, aspects))


def iter_in_order(dataset: StoreDataset, batch_size: int) -> Iterator[Batch]:
    """Every record of the selection exactly once, whole frames, for evaluation."""
    for start in range(0, len(dataset), batch_size):
        yield dataset.__getitems__(list(range(start, min(start + batch_size, len(dataset)))))


def _same(batch: Batch) -> Batch:
    return batch


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; keys and boxes stay."""
    if device == batch.inputs.device:
        return batch
    moved: Batch = _move(batch, device)
    return moved


def _move(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # From pageable memory the copy would wait for the device whatever is asked for.
        source = value.pin_memory() if device.type == "cuda" else value
        return source.to(device, non_blocking=True)
    if isinstance(value, (Batch, StoredTargets)):
        names = value.__dataclass_fields__
        return type(value)(**{name: _move(getattr(value, name), device) for name in names})
    return tuple(_move(member, device) for member in value) if isinstance(value, tuple) else value
