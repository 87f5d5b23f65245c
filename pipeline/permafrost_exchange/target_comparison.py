"""Comparison of a sample of stored targets with the outputs of a teacher, and the search for the cause of a difference.

The teacher runs on the same views, and what it says is compared with what is stored, view by view. The first views are
kept to look for a cause: in the values themselves (diagnosis.py), and in other inputs of the teacher
(other_inputs.py).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.outputs import BatchInfo
from permafrost.annotation.precision import agreement_of, in_network_units
from permafrost.annotation.samples import Sample, SampleTask
from permafrost.annotation.stored_views import DrawnViews, read_inputs
from permafrost.core.batches import Rendering
from permafrost.core.errors import UserError, first_line, require
from permafrost.core.progress import say_if_slow
from permafrost.core.records import PIXEL_FIELD, TOP_LOGITS, FieldSpec
from permafrost.loading.recipes import recipe_from
from permafrost.loading.selected_records import SelectedRecords
from permafrost.loading.windows import stored_views_of
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.fields import Values
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.manifest import Agreement
from permafrost.store.reader import TeacherPass
from permafrost.store.shards import ShardEntry
from permafrost_exchange.diagnosis import (
    CLOSE_NATS,
    Cause,
    StoredOutputs,
    centered_cosines,
    find_cause_of_field,
    find_cause_of_outputs,
)
from permafrost_exchange.ingest_shards import IngestShard
from permafrost_exchange.map_forms import NAME_MAKER, NEGATIVE, MapForm
from permafrost_exchange.other_inputs import (
    CROP_FRACTIONS,
    OtherInput,
    center_cropped,
    other_sizes,
    other_values,
)
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.passport")

CLOSE_COSINE = 0.02
"""1 minus a mean cosine that rounding explains."""
_MAX_DIAGNOSED = 512
"""Number of views that are kept to look for a cause."""
_TRIED = 16
"""Number of records on which the teacher is run in other ways."""
_LEFT_BY_CROP = 0.05
"""Fraction of a difference that the right part of the image may leave, as crops differ by the library."""
_LEFT_BY_INPUT = 0.01
"""The same for all other inputs, as what looks like one change of pixels may be another."""
_NEARER = 0.5
"""Fraction of the distance below which the nearest of the other ways is told."""


def distance_of(agreement: Agreement) -> float:
    """Return the distance of an agreement: nats, or without logits 1 minus the mean cosine of all fields."""
    if agreement.kl_mean is not None:
        return agreement.kl_mean
    return 1 - float(np.mean(list(agreement.cosine_mean.values()) or [1.0]))


def closest(agreement: Agreement) -> float:
    """Return the distance that rounding explains."""
    return CLOSE_COSINE if agreement.kl_mean is None else CLOSE_NATS


class TargetFacts(NamedTuple):
    """Facts about a pass that its values are compared by."""

    fields: tuple[FieldSpec, ...]
    classes: int
    frame: str
    crop_fraction: float | None
    """Fraction of a center crop, None for another frame."""
    explainer: dict[str, Any]
    temperatures: tuple[float, ...]
    operations: tuple[dict[str, Any], ...] | None
    """Recipe of stored views, None for the canonical view."""
    rendering: Rendering
    """Rules by which views show images."""
    cuts_originals: bool
    """True if views are windows of the original images."""


class _Batch(NamedTuple):
    """Some records of the sample: what the teacher receives, and what is stored."""

    frames: FrameBatch
    keys: Sequence[str]
    stored: Values
    """Fields [n, V, ...]."""
    views: DrawnViews | None
    """Views of the records, None for the canonical one."""

    @property
    def keys_of_views(self) -> list[str]:
        """Key of each stored view's record, of length n V."""
        num_views = next(iter(self.stored.values())).shape[1]
        return [key for key in self.keys for _ in range(num_views)]

    def explained_in(self, view: int) -> Tensor:
        """Return the class that each map of a view explains, as the label of its record; without maps the labels."""
        classes = self.stored.get("target_class")
        if classes is None or classes.shape[-1] > 1:
            return self.frames.labels
        return torch.from_numpy(classes[:, view, 0].astype(np.int64))

    def first(self, count: int) -> _Batch:
        """Return the first records."""
        rows = slice(0, count)
        return _Batch(
            FrameBatch(*(column[rows] for column in self.frames)),
            self.keys[rows],
            {name: values[rows] for name, values in self.stored.items()},
            None if self.views is None else self.views.select(rows),
        )


@dataclass(frozen=True, kw_only=True)
class ComparePassport(SampleTask[tuple[Agreement, list[Cause], str]]):
    """Task that compares a sample of stored targets with the outputs of a teacher, and writes nothing."""

    facts: TargetFacts
    source: IngestShard | RootedPath
    """Targets that are not stored yet, or the folder of a pass."""
    most_views: int
    class_names: tuple[str, ...]
    """Names of the teacher's classes, empty if they are not those of the data."""
    unexplained: str
    """Why the teacher is not explained, empty if it is."""

    def measure(self, sample: Sample) -> tuple[int, tuple[Agreement, list[Cause], str]]:
        try:
            return self._measure(sample)
        except Exception as error:  # any error of the user's explainer
            is_known = isinstance(error, (UserError, torch.OutOfMemoryError))
            if is_known or "maps" not in (outputs := self.config.outputs):
                raise
            left = replace(self.config, outputs=tuple(name for name in outputs if name != "maps"))
            failed = f"explainer={self.explainer.kind} fails: {first_line(error)}"
            return replace(self, config=left, unexplained=failed).measure(sample)

    def _measure(self, sample: Sample) -> tuple[int, tuple[Agreement, list[Cause], str]]:
        annotator = self.build_annotator()
        if self.facts.operations is None:
            annotator = annotator.with_changes(crop_fraction=self.facts.crop_fraction)
        columns: dict[str, list[NDArray[Any]]] = defaultdict(list)
        compared: list[tuple[Values, Values]] = []
        keys: list[str] = []
        records = 0
        largest: _Batch | None = None
        for batch in self._batches(sample, annotator.input_size):
            pair = _compared_values(OtherInput(annotator), batch)
            for name, column in _distances(self.facts, *pair).items():
                columns[name].append(column)
            if len(keys) < _MAX_DIAGNOSED:
                compared.append(pair)
            keys += batch.keys_of_views
            records += len(batch.keys)
            if largest is None or len(batch.keys) > len(largest.keys):
                largest = batch
        if largest is None:
            raise TargetError(
                "EXIF turns all photographs of the sample, and targets of whole images are not compared for these; set "
                "passport.records=null to compare all records, or remove teacher="
            )
        stored, teacher = (
            _joined((name, [values[name] for values in batches]) for name in batches[0])
            for batches in zip(*compared, strict=True)
        )
        if len(keys) <= _MAX_DIAGNOSED:  # centered on all of them, as a shard may have few
            together = _distances(self.facts, stored, teacher)
            columns.update({name: [column] for name, column in together.items()})
        agreement = agreement_of("float32", records, keys, _joined(columns.items()))
        misfit, maps = self._compare_maps(stored, teacher, columns)
        require(
            agreement.kl_mean is not None or bool(agreement.cosine_mean or maps),
            "teacher= has no output of the kinds and shapes of these targets, so nothing was compared; name the "
            "network that made them, and with format.fields= what the arrays are (logits, pooled, ...)",
            TargetError,
        )
        causes: list[Cause] = []
        if self.facts.frame != "unknown":
            search = _Search(annotator, largest, self.facts, closest(agreement))
            with say_if_slow(logger, "looking for what explains the difference ..."):
                causes = self._find_causes(agreement, stored, teacher, keys, search)
        if misfit is not None and all(cause.kind != "preprocessing" for cause in causes):
            causes.append(misfit)
        return records, (agreement, causes, maps)

    def _compare_maps(
        self,
        stored: Values,
        teacher: Values,
        columns: dict[str, list[NDArray[Any]]],
    ) -> tuple[Cause | None, str]:
        """Return why the explainer cannot have made the maps, and the agreement of the maps as text."""
        if "map" not in stored:
            return None, ""
        cause, reason = None, self.unexplained
        if not reason and (form := MapForm.of(stored["map"])).differs(
            theirs := MapForm.of(teacher["map"])
        ):
            reason = (
                f"format.explainer={self.explainer.kind}: the maps are {form.describe(NEGATIVE)}, but "
                f"{self.explainer.kind} of {self.teacher.name} gives {theirs.describe('below 0')}"
            )
            cause = Cause("explainer", reason, f"{NAME_MAKER}, or the network with teacher=", 0.0)
        if not reason and self.facts.frame == "unknown":
            reason = "format.frame=unknown"
        if reason or "map" not in columns:
            return cause, f"maps: not compared ({reason or 'the teacher explains other classes'})"
        cosines = np.concatenate(columns["map"])
        sizes = stored["map_scale"] / np.maximum(teacher["map_scale"], np.finfo(np.float32).tiny)
        low, middle, high = np.quantile(sizes, (0.05, 0.5, 0.95))
        return None, (
            f"maps: cosine {np.median(cosines):.3f} (median), lowest {cosines.min():.3f} over {len(cosines)} records; "
            f"size {middle:.3g} times the explainer's ({low:.3g} to {high:.3g})"
        )

    def _find_causes(
        self,
        agreement: Agreement,
        stored: Values,
        teacher: Values,
        keys: Sequence[str],
        search: _Search,
    ) -> list[Cause]:
        """Explain the differences: that of the outputs, and those of maps and vectors.

        Args:
            agreement: Agreement of the whole sample.
            stored: Stored fields of the first views.
            teacher: The teacher's.
            keys: Keys of the views.
            search: Search of other inputs.
        """
        cause = None
        if distance_of(agreement) > closest(agreement):
            if agreement.kl_mean is None:
                cause = search.find()
            else:
                outputs = StoredOutputs.of(stored, self.facts.temperatures)
                logits = teacher["logits"][:, 0].astype(np.float64)
                cause = (
                    find_cause_of_outputs(logits, outputs, keys, self.class_names) or search.find()
                )
        causes = [] if cause is None else [cause]
        if cause is not None and cause.kind in ("classes", "rows", "preprocessing"):
            return causes  # maps of the same rows, or of the same other input, differ for the same reason
        for spec, one, other, rows in _fields_of_both(self.facts, stored, teacher):
            if len(rows) > 1 and centered_cosines(one, other).mean() <= 1 - CLOSE_COSINE:
                of_rows = [keys[row] for row in rows]
                is_map = spec.axes[-1] == "x"
                cause = find_cause_of_field(spec.name, one, other, of_rows, is_map=is_map)
                causes += [] if cause is None else [cause]
        return causes

    def _batches(self, sample: Sample, size: tuple[int, int]) -> Iterator[_Batch]:
        """Iterate over the sample, with windows of this (height, width)."""
        for shard, records in sample:
            rows = self._rows_of(shard)[:records]
            first = self._store.rows_of_shard(self._store.shards.number_of(shard.name)).start
            if self.facts.operations is None:
                # Targets of whole photographs that EXIF turns are of another image than the teacher is shown.
                rows = rows[self._store.index.values("orientation", first + rows) == 1]
            for start in range(0, len(rows), self.config.records_per_batch):
                part = rows[start : start + self.config.records_per_batch]
                stored = self._read(shard, part)
                views = self._views_of(stored, SelectedRecords(self._store, first + part).sizes())
                frames = read_inputs(
                    ShardFrames(self._store, shard, part), views, size, 0, len(part)
                )
                yield _Batch(frames, self._store.index.keys(first + part), stored, views)

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
        return np.flatnonzero(self._pass.rows_of(shard) >= 0)

    def _read(self, shard: ShardEntry, rows: NDArray[np.int64]) -> Values:
        """Read the stored form of rows of a shard, of their first views."""
        if isinstance(self.source, IngestShard):
            values = self.source.read(shard, rows).values
            return {name: each[:, : self.most_views] for name, each in values.items()}
        places = self._pass.rows_of(shard)[rows]
        views = [np.full(len(rows), n) for n in range(min(self.most_views, self._pass.num_views))]
        opened = self._pass.open_shard(shard, [spec.name for spec in self.facts.fields])
        return {
            name: np.stack([each[places, view] for view in views], axis=1)
            for name, each in opened.items()
        }

    @cached_property
    def _pass(self) -> TeacherPass:
        assert isinstance(self.source, RootedPath)
        return TeacherPass(self._store, self.source)


# ---- values --------------------------------------------------------------------------------------


def _joined(parts: Iterable[tuple[str, Sequence[NDArray[Any]]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate(arrays) for name, arrays in parts}


def _compared_values(way: OtherInput, batch: _Batch) -> tuple[Values, Values]:
    """Return the stored fields of a batch and those of a teacher that is run in some way, [n V, 1, ...] each."""
    inputs = (
        [way.annotator.inputs_of(batch.frames)]
        if batch.views is None
        else way.annotator.inputs_of_views(batch.frames, batch.views)
    )
    views = [
        way.annotator.stored_fields(
            way.change(images), BatchInfo(batch.keys, batch.explained_in(view))
        )
        for view, images in enumerate(inputs)
    ]
    teacher = {name: np.stack([view[name] for view in views], axis=1) for name in views[0]}
    stored, teacher = (
        {name: each.reshape(-1, 1, *each.shape[2:]) for name, each in values.items()}
        for values in (batch.stored, teacher)
    )
    return stored, teacher


def _distances(facts: TargetFacts, stored: Values, teacher: Values) -> dict[str, NDArray[Any]]:
    """Compare the fields of views: `top1` and `kl` in nats if there are logits, and the cosines of each other field."""
    distances: dict[str, NDArray[Any]] = {}
    if "logits" in stored or TOP_LOGITS in stored:
        outputs = StoredOutputs.of(stored, facts.temperatures)
        logits = teacher["logits"][:, 0]
        distances = {"top1": logits.argmax(axis=1) == outputs.top, "kl": outputs.divergence(logits)}
    return distances | {
        spec.name: centered_cosines(one, other)
        for spec, one, other, _ in _fields_of_both(facts, stored, teacher)
    }


def _fields_of_both(
    facts: TargetFacts, stored: Values, teacher: Values
) -> Iterator[tuple[FieldSpec, NDArray[Any], NDArray[Any], NDArray[np.int64]]]:
    """Iterate over maps, features and embeddings: the field, the teacher's values, the stored ones, and their views.

    Maps are those of views of which both explain the same class.
    """
    for spec in facts.fields:
        name = _same_field(spec, teacher)
        is_compared = spec.axes[-1:] in (("x",), ("feature",), ("channel",))
        if name is None or not is_compared or spec.name.endswith("_scale"):
            continue
        rows = np.arange(len(stored[spec.name]))
        if spec.name == "map":
            is_same = teacher["target_class"][:, 0] == stored["target_class"][:, 0]
            rows = np.flatnonzero(is_same.all(axis=1))
        if len(rows):
            one, other = in_network_units(teacher, name), in_network_units(stored, spec.name)
            yield spec, one[rows], other[rows], rows


def _same_field(spec: FieldSpec, teacher: Values) -> str | None:
    """Return the teacher's field of the same kind and shape, the deepest one of several stages; None if it has none.

    Files do not number stages as this project does, so features may be those of any stage.
    """
    prefix, _, number = spec.name.rpartition("_")
    names = (
        sorted((name for name in teacher if name.rpartition("_")[0] == prefix), reverse=True)
        if number.isdigit()
        else [spec.name]
    )
    return next(
        (name for name in names if name in teacher and teacher[name].shape[2:] == spec.shape), None
    )


# ---- other inputs --------------------------------------------------------------------------------


class _Search:
    """Search for another input of the teacher that explains the targets of some records."""

    def __init__(
        self, annotator: TeacherAnnotator, batch: _Batch, facts: TargetFacts, close: float
    ) -> None:
        """Take the first records of a batch, and the distance that rounding explains."""
        self.annotator = annotator
        self.batch = batch.first(_TRIED)
        self.facts, self.close = facts, close
        self.tried: list[tuple[float, OtherInput]] = []
        """Distance to the targets with each input."""

    def find(self) -> Cause | None:
        """Return the input that explains the targets, or as an unknown cause one that is much nearer."""
        if self.batch.frames.frames.ndim == 2:  # rows of a table
            return None
        self._try(OtherInput(self.annotator))
        if (before := self.tried[0][0]) < 2 * self.close:  # these records are as they should be
            return None
        stages = [(other_values(self.annotator), _LEFT_BY_INPUT)]
        if self.facts.operations is None:
            frames, sizes = self._frames(), other_sizes(self.annotator)
            stages = [(frames, _LEFT_BY_CROP), (sizes, _LEFT_BY_INPUT), *stages]
        for ways, left in stages:
            for way in ways:
                self._try(way)
            distance, nearest = self._nearest()
            if distance <= max(self.close, left * before):
                return Cause("preprocessing", nearest.text, nearest.advice, distance)
        if distance > _NEARER * before:
            return None
        return Cause("unknown", f"the nearest of what was tried: {nearest.text}", "", distance)

    def _frames(self) -> Iterator[OtherInput]:
        """Iterate over parts of the image, with finer steps near the best of those that were tried."""
        yield from (
            center_cropped(self.annotator, fraction) for fraction in (None, *CROP_FRACTIONS)
        )
        for step in (0.01, 0.001):
            best = self._nearest()[1].annotator.crop_fraction or 1.0
            yield from (
                center_cropped(self.annotator, min(1.0, round(best + number * step, 3)))
                for number in range(-5, 6)
            )
        best = self._nearest()[1].annotator.crop_fraction or 1.0
        yield center_cropped(self.annotator, round(64 * best) / 64)

    def _nearest(self) -> tuple[float, OtherInput]:
        return min(self.tried, key=itemgetter(0))

    def _try(self, way: OtherInput) -> None:
        """Run the teacher in some way, and note its distance to the targets."""
        try:
            distances = _distances(self.facts, *_compared_values(way, self.batch))
        except (RuntimeError, ValueError, AssertionError):  # of networks that take no such input
            return
        agreement = agreement_of(
            "float32", len(self.batch.keys), self.batch.keys_of_views, distances
        )
        self.tried.append((distance_of(agreement), way))
