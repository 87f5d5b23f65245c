"""Comparison of a sample of stored targets with the outputs of a teacher, and the search for the cause of a difference.

The teacher runs on the same views. What is stored and what it says are compared view by view, and the first views are
kept to look for a cause: in the values themselves (diagnosis.py), and in other inputs of the teacher
(other_inputs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.payloads import BatchInfo
from permafrost.annotation.precision import in_network_units
from permafrost.annotation.samples import Sample, SampleTask
from permafrost.annotation.stored_views import DrawnViews, read_inputs
from permafrost.core.batches import Rendering
from permafrost.core.progress import say_if_slow
from permafrost.core.records import PIXEL_FIELD, TOP_LOGITS, FieldSpec
from permafrost.loading.recipes import recipe_from
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.windows import stored_views_of
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.fields import Values
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.manifest import Agreement
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry
from permafrost_exchange.diagnosis import (
    CLOSE_NATS,
    Cause,
    StoredOutputs,
    center_of,
    centered_cosines,
    explains,
    find_cause_of_maps,
    find_cause_of_outputs,
    find_noise,
    find_other_rows,
)
from permafrost_exchange.ingest_shards import IngestShard
from permafrost_exchange.other_inputs import (
    OtherInput,
    as_they_are,
    center_cropped,
    other_frames,
    other_sizes,
    other_values,
)
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.passport")

CLOSE_COSINE = 0.02
"""1 minus a mean cosine that rounding explains."""
_MAX_DIAGNOSED = 512
"""Number of views that are kept to look for a cause."""
_EXACT_INPUT = 0.01
"""Median error of the outputs, relative to their spread, that another implementation of the same input explains."""
_TRIED = 32
"""Number of records on which the teacher is run in other ways."""
_SCREENED = 6
"""Number of them on which ways that do not come closer are left out."""
_NEARER = 0.5
"""Fraction of the distance below which the nearest of the other ways is told."""


class TargetFacts(NamedTuple):
    """Facts about a pass that its values are compared by."""

    fields: tuple[FieldSpec, ...]
    classes: int
    frame: str
    crop_fraction: float | None
    explainer: dict[str, Any]
    temperatures: tuple[float, ...]
    operations: tuple[dict[str, Any], ...] | None
    """Recipe of stored views, None for the canonical view."""
    rendering: Rendering = field(default_factory=Rendering)
    """Rules by which views show images."""
    cuts_originals: bool = False
    """True if views are windows of the original images."""

    @property
    def has_logits(self) -> bool:
        """True if logits are among the targets."""
        return any(spec.name in ("logits", TOP_LOGITS) for spec in self.fields)

    def compared(self) -> list[FieldSpec]:
        """Return the fields of maps, features and embeddings."""
        return [
            spec
            for spec in self.fields
            if spec.axes[-1:] in (("x",), ("feature",), ("channel",))
            and not spec.name.endswith("_scale")
        ]


class _Batch(NamedTuple):
    """Some records of the sample: what the teacher receives, and what is stored."""

    frames: FrameBatch
    keys: Sequence[str]
    stored: Values
    """Fields [n, V, ...]."""
    views: DrawnViews | None
    """Views of the records, None for the canonical one."""


@dataclass(frozen=True, kw_only=True)
class ComparePassport(SampleTask[tuple[Agreement, list[Any]]]):
    """Task that compares a sample of stored targets with the outputs of a teacher, and writes nothing."""

    facts: TargetFacts
    source: IngestShard | RootedPath
    """Targets that are not stored yet, or the folder of a pass."""
    most_views: int
    class_names: tuple[str, ...]
    """Names of the teacher's classes, empty if they are not those of the data."""

    def measure(self, sample: Sample) -> tuple[int, tuple[Agreement, list[Any]]]:
        annotator = self.build_annotator()
        if self.facts.operations is None:
            is_crop = self.facts.frame == "center_crop"
            fraction = self.facts.crop_fraction if is_crop else None
            annotator = annotator.with_changes(crop_fraction=fraction)
        comparison = _Comparison(self.facts)
        tried: list[_Batch] = []
        count = 0
        for batch in self._batches(sample, annotator.input_size):
            answers = _flat(annotator.annotate([batch.frames], batch.keys, batch.views)[0])
            comparison.add(_flat(batch.stored), answers, _keys_of_views(batch))
            if count < _TRIED:
                tried.append(batch)
            count += len(batch.keys)
        if not count:
            raise TargetError(
                "EXIF turns all photographs of the sample, and targets of whole images are not compared for these; set "
                "passport.records=null to compare all records, or remove teacher="
            )
        agreement = comparison.agreement(count)
        causes: list[Cause] = []
        if self.facts.frame != "unknown":
            with say_if_slow(logger, "looking for what explains the difference ..."):
                causes = comparison.causes(
                    self.class_names, lambda: _other_input(annotator, tried, self.facts)
                )
        return count, (agreement, causes)

    def _batches(self, sample: Sample, size: tuple[int, int]) -> Iterator[_Batch]:
        """Iterate over the sample, with windows of this (height, width)."""
        for shard, records in sample:
            rows = self._rows_of(shard)[:records]
            first = self._store.rows_of_shard(self._number(shard)).start
            if self.facts.operations is None:
                # Targets of whole photographs that EXIF turns are of another image than the teacher is shown.
                rows = rows[self._store.index.values("orientation", first + rows) == 1]
            for start in range(0, len(rows), self.config.records_per_batch):
                part = rows[start : start + self.config.records_per_batch]
                stored = self._read(shard, part)
                frames = ShardFrames(self._store, shard, part)
                sizes = SelectedRecords(self._store, first + part).sizes()
                views = self._views_of(stored, sizes)
                batch = read_inputs(frames, views, size, 0, len(part))
                yield _Batch(batch, self._store.index.keys(first + part), stored, views)

    def _views_of(self, stored: Values, sizes: Tensor) -> DrawnViews | None:
        if self.facts.operations is None:
            return None
        recipe = recipe_from(self.facts.operations)
        pixels = stored.get(PIXEL_FIELD)
        return DrawnViews(
            stored_views_of(stored, recipe, sizes, self._store.size, "the views of the targets"),
            None if pixels is None else torch.from_numpy(pixels),
            recipe,
            rendering=self.facts.rendering,
            cuts_originals=self.facts.cuts_originals,
        )

    def _rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        if isinstance(self.source, IngestShard):
            return self.source.rows_of(shard)
        covered: NDArray[np.int64] = np.flatnonzero(self._pass.rows_of(shard) >= 0)
        return covered

    def _read(self, shard: ShardEntry, rows: NDArray[np.int64]) -> Values:
        """Read the stored form of rows of a shard, of their first views."""
        if isinstance(self.source, IngestShard):
            values = self.source.read(shard, rows).values
            return {name: each[:, : self.most_views] for name, each in values.items()}
        places = self._pass.rows_of(shard)[rows]
        views = np.arange(min(self.most_views, self._pass.num_views))
        names = [spec.name for spec in self.facts.fields]
        opened = self._pass.open_shard(shard, names)
        at_rows, at_views = (axis.ravel() for axis in np.meshgrid(places, views, indexing="ij"))
        return {
            name: np.asarray(each[at_rows, at_views]).reshape(
                len(places), len(views), *each.shape[2:]
            )
            for name, each in opened.items()
        }

    def _number(self, shard: ShardEntry) -> int:
        return self._store.shards.number_of(shard.name)

    @cached_property
    def _store(self) -> Store:
        return Store(self.store_path)

    @cached_property
    def _pass(self) -> TeacherPass:
        assert isinstance(self.source, RootedPath)
        return TeacherPass(self._store, self.source)


def _same_field(spec: FieldSpec, teacher: Values) -> str | None:
    """Return the teacher's field of the same kind and shape, the deepest one of several stages; None if it has none.

    Files do not number stages as this project does, so features may be those of any stage.
    """
    prefix, _, number = spec.name.rpartition("_")
    names = [spec.name]
    if number.isdigit():
        names = sorted(
            (name for name in teacher if name.rpartition("_")[0] == prefix), reverse=True
        )
    return next(
        (name for name in names if name in teacher and teacher[name].shape[2:] == spec.shape), None
    )


def _flat(values: Values) -> Values:
    """Return fields [n, V, ...] as those of n V views, [n V, 1, ...]."""
    return {name: each.reshape(-1, 1, *each.shape[2:]) for name, each in values.items()}


def _joined(parts: Sequence[Values]) -> Values:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _keys_of_views(batch: _Batch) -> list[str]:
    count = next(iter(batch.stored.values())).shape[1]
    return [key for key in batch.keys for _ in range(count)]


class _Comparison:
    """Distances of all views of a sample, and the values of the first ones."""

    def __init__(self, facts: TargetFacts) -> None:
        self.facts = facts
        self.worst = (-1.0, "")
        """Largest divergence, and the key of its record."""
        self.same_top: list[NDArray[np.bool_]] = []
        self.nats: list[NDArray[np.float64]] = []
        self.errors: list[NDArray[np.float64]] = []
        self.cosines: dict[str, list[NDArray[np.float64]]] = {}
        self._centers: dict[str, NDArray[np.float64]] = {}
        self._kept: list[tuple[Values, Values, Sequence[str]]] = []
        self._num_kept = 0

    def add(self, stored: Values, teacher: Values, keys: Sequence[str]) -> None:
        """Compare the fields of some views, [n, 1, ...] each."""
        if self._num_kept < _MAX_DIAGNOSED:
            self._kept.append((stored, teacher, keys))
            self._num_kept += len(keys)
        if self.facts.has_logits:
            outputs = StoredOutputs(stored, self.facts.temperatures)
            logits = teacher["logits"][:, 0]
            self.same_top.append(outputs.same_top(logits))
            nats = outputs.divergence(logits)
            self.nats.append(nats)
            self.worst = max(self.worst, (float(nats.max()), keys[int(nats.argmax())]))
            self.errors.append(outputs.errors(logits))
        for spec in self.facts.compared():
            pair = _pair_of(spec, stored, teacher)
            if pair is None:
                continue
            if spec.name not in self._centers and len(pair[0]):
                self._centers[spec.name] = center_of(pair[0])
            if len(pair[0]):
                column = centered_cosines(*pair, self._centers[spec.name])
                self.cosines.setdefault(spec.name, []).append(column)

    def agreement(self, records: int) -> Agreement:
        """Return the agreement.

        Raises:
            TargetError: If nothing could be compared.
        """
        if not self.nats and not self.cosines:
            raise TargetError(
                "teacher= has no output of the kinds and shapes of these targets, so nothing was compared; name the "
                "network that made them, and with format.fields= what the arrays are (logits, pooled, ...)"
            )
        columns = {name: np.concatenate(parts) for name, parts in self.cosines.items()}
        of_logits: dict[str, Any] = {}
        if self.nats:
            nats = np.concatenate(self.nats)
            of_logits = {
                "top1": float(np.concatenate(self.same_top).mean()),
                "kl_mean": float(nats.mean()),
                "kl_largest": self.worst[0],
                "kl_largest_key": self.worst[1],
            }
        return Agreement(
            precision="float32",
            records=records,
            cosine_mean={name: float(column.mean()) for name, column in columns.items()},
            cosine_lowest={name: float(column.min()) for name, column in columns.items()},
            **of_logits,
        )

    def distance(self) -> float:
        """Return the mean divergence, or without logits 1 minus the mean cosine of all fields."""
        if self.nats:
            return float(np.concatenate(self.nats).mean())
        means = [1 - np.concatenate(parts).mean() for parts in self.cosines.values()]
        return float(np.mean(means)) if means else 0.0

    def causes(
        self, class_names: Sequence[str], other_input: Callable[[], Cause | None]
    ) -> list[Cause]:
        """Explain the differences: that of the outputs, and those of maps and vectors.

        Args:
            class_names: Names of the data's classes.
            other_input: Finds another input of the teacher that explains the targets, None if there is none.
        """
        stored = _joined([part[0] for part in self._kept])
        teacher = _joined([part[1] for part in self._kept])
        keys = [key for part in self._kept for key in part[2]]
        causes, order = [], None
        is_of_this_input = True
        if self.nats and self.distance() > CLOSE_NATS:
            outputs = StoredOutputs(stored, self.facts.temperatures)
            logits = teacher["logits"][:, 0].astype(np.float64)
            explained = find_cause_of_outputs(logits, outputs, keys, class_names)
            cause, order = explained or (None, None)
            if cause is None:
                cause = other_input()
            if cause is None or cause.kind == "unknown":
                noise = find_noise(logits, outputs)
                if noise is not None:
                    text = f"they have noise with a standard deviation of {noise:.2g} on each logit"
                    advice = "save them as the teacher gives them"
                    cause = Cause("noise", text, advice, self.distance())
            if cause is not None:
                causes.append(cause)
                # Maps of the same rows, or of the same other input, differ for the same reason.
                is_of_this_input = cause.kind not in ("rows", "preprocessing", "unknown")
        elif not self.nats and self.distance() > CLOSE_COSINE:
            cause = other_input()
            causes += [] if cause is None else [cause]
            is_of_this_input = cause is None or cause.kind == "unknown"
        if is_of_this_input:
            causes += self._causes_of_fields(stored, teacher, keys, order)
        return causes

    def _causes_of_fields(
        self,
        stored: Values,
        teacher: Values,
        keys: Sequence[str],
        order: NDArray[np.int64] | None,
    ) -> Iterator[Cause]:
        """Iterate over the causes of the differences of maps and vectors."""
        for spec in self.facts.compared():
            rows: NDArray[Any] = np.arange(len(keys))
            if spec.name == "map":
                rows = np.flatnonzero(_explains_same(stored, teacher, order))
            pair = _pair_of(spec, stored, teacher, rows)
            if pair is None or len(rows) < 2:
                continue
            if centered_cosines(*pair, center_of(pair[0])).mean() > 1 - CLOSE_COSINE:
                continue
            find = find_cause_of_maps if spec.axes[-1] == "x" else find_other_rows
            cause = find(spec.name, *pair, [keys[row] for row in rows])
            if cause is not None:
                yield cause


def _explains_same(
    stored: Values, teacher: Values, order: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """Return the views whose two maps explain the same class, where the stored classes may have another order."""
    classes = stored["explained_class"][:, 0]
    if order is not None:
        classes = np.where(classes >= 0, order[np.maximum(classes, 0)], classes)
    return np.asarray((teacher["explained_class"][:, 0] == classes).all(axis=1))


def _pair_of(
    spec: FieldSpec, stored: Values, teacher: Values, rows: NDArray[Any] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return the teacher's and the stored values of a field in the network's units, None if the teacher has none.

    Args:
        spec: The field.
        stored: Fields of views, [n, 1, ...] each.
        teacher: Those of the teacher.
        rows: Views to take; None takes those that can be compared.
    """
    name = _same_field(spec, teacher)
    if name is None:
        return None
    if rows is None:
        rows = np.arange(len(stored[spec.name]))
        if spec.name == "map":
            rows = np.flatnonzero(_explains_same(stored, teacher))
    one, other = in_network_units(teacher, name), in_network_units(stored, spec.name)
    return one[rows], other[rows]


def _other_input(
    annotator: TeacherAnnotator, batches: Sequence[_Batch], facts: TargetFacts
) -> Cause | None:
    """Find another input of the teacher that explains the targets of some records, None if there is none."""
    if batches[0].frames.frames.ndim == 2:  # rows of a table
        return None
    search = _Search(annotator, batches, facts)
    if facts.operations is None:
        for way in other_frames(annotator):
            search.explains(way)
        search.refine_frame(annotator)
        if not search.causes:
            for way in other_sizes(annotator):
                search.explains(way, is_exact=True)
    if not search.causes:
        for way in other_values(annotator):
            search.explains(way, is_exact=True)
    return search.result()


class _Search:
    """Search for an input of the teacher that explains targets."""

    def __init__(
        self, annotator: TeacherAnnotator, batches: Sequence[_Batch], facts: TargetFacts
    ) -> None:
        self.facts = facts
        self.batches = _first_of(batches, _TRIED)
        self.few = _first_of(batches, _SCREENED)
        """Records on which most of what explains nothing is left out."""
        stated = OtherInput("", "", annotator, as_they_are)
        self.before, self.before_few = (
            self._compare(stated, batches).distance() for batches in (self.batches, self.few)
        )
        self.causes: list[Cause] = []
        self.nearest: list[tuple[float, str]] = []
        """Distance and text of each input that comes closer."""
        self.fractions: list[tuple[float, float]] = []
        """Distance and fraction of each center crop."""

    def _compare(self, way: OtherInput, batches: Sequence[_Batch]) -> _Comparison:
        return _compared_with(way, batches, self.facts)

    def explains(self, way: OtherInput, *, is_exact: bool = False) -> float:
        """Compare the targets with another input, and return their distance, on few records if it is no nearer.

        Args:
            way: The input.
            is_exact: True if it explains the targets only where they are the same up to rounding, as what looks like
                one change of pixels may be another. Crops differ by the library that makes them.
        """
        try:
            few = self._compare(way, self.few).distance()
            if few > self.before_few:
                return few
            comparison = self._compare(way, self.batches)
        except (RuntimeError, ValueError, AssertionError):  # of networks that take no such input
            return float("inf")
        distance = comparison.distance()
        if way.annotator.crop_fraction is not None:
            self.fractions.append((distance, way.annotator.crop_fraction))
        self.nearest.append((distance, way.text))
        close = CLOSE_NATS if self.facts.has_logits else CLOSE_COSINE
        is_explained = distance <= close or explains(self.before, distance)
        if is_exact and comparison.errors:
            is_explained &= float(np.median(np.concatenate(comparison.errors))) < _EXACT_INPUT
        if is_explained and self.before - distance >= close:
            self.causes.append(Cause("preprocessing", way.text, way.advice, distance))
        return distance

    def result(self) -> Cause | None:
        """Return the cause that leaves least, or the nearest input as a cause that is unknown; None for neither."""
        if self.causes:
            return min(self.causes, key=lambda cause: cause.left)
        distance, text = min(self.nearest, default=(float("inf"), ""))
        if distance > _NEARER * self.before:
            return None
        return Cause("unknown", f"the nearest of what was tried: {text}", "", distance)

    def refine_frame(self, annotator: TeacherAnnotator) -> None:
        """Search for the fraction of a center crop near the best of those that were tried."""

        def distance(fraction: float) -> float:
            return self.explains(center_cropped(annotator, fraction))

        if not self.fractions:
            return
        best = min(self.fractions)[1]
        bounds = (max(0.1, best - 0.06), min(1.0, best + 0.06))
        result = minimize_scalar(  # of three digits, as 0.874997 would be named in place of 0.875
            lambda fraction: distance(round(fraction, 3)),
            bounds=bounds,
            method="bounded",
            options={"xatol": 5e-4},
        )
        for fraction in (round(result.x, 2), round(64 * result.x) / 64):
            distance(fraction)


def _first_of(batches: Sequence[_Batch], count: int) -> list[_Batch]:
    """Return the first `count` records of batches, or all of them."""
    taken: list[_Batch] = []
    for batch in batches:
        rows = slice(0, count - sum(len(batch.keys) for batch in taken))
        if rows.stop <= 0:
            break
        taken.append(
            _Batch(
                FrameBatch(*(column[rows] for column in batch.frames)),
                batch.keys[rows],
                {name: values[rows] for name, values in batch.stored.items()},
                None if batch.views is None else batch.views.select(rows),
            )
        )
    return taken


def _compared_with(way: OtherInput, batches: Sequence[_Batch], facts: TargetFacts) -> _Comparison:
    """Compare the targets of some records with a teacher that is run in another way."""
    comparison = _Comparison(facts)
    for batch in batches:
        info = BatchInfo(batch.keys, batch.frames.labels)
        inputs = (
            [way.annotator.inputs_of(batch.frames)]
            if batch.views is None
            else way.annotator.inputs_of_views(batch.frames, batch.views)
        )
        answers = [way.annotator.stored_fields(way.change(frames), info) for frames in inputs]
        teacher = {
            name: np.stack([answer[name] for answer in answers], axis=1) for name in answers[0]
        }
        comparison.add(_flat(batch.stored), _flat(teacher), _keys_of_views(batch))
    return comparison
