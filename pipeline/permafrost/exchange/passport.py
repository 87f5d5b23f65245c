"""Passport of targets that were made elsewhere: the teacher that they are said to be of, run on a sample of the views.

What is stored and what the teacher says are compared: the class of the largest logit, the divergence
KL(teacher || stored) in nats, and the cosine of each map, feature and embedding to the teacher's, of what is left when
the mean over the records is taken away. If they differ, the cause is looked for among mistakes that others have made
(diagnosis.py, other_inputs.py). A cause that explains the difference stops with the way out, unless the options accept
its kind; a difference that nothing explains is a warning, or stops where the targets hardly resemble the teacher's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.payloads import BatchInfo
from permafrost.annotation.precision import describe_agreement, in_network_units
from permafrost.annotation.samples import Sample, SampleTask, select_sample
from permafrost.annotation.stored_views import DrawnViews
from permafrost.config.cluster import ClusterConfig
from permafrost.config.exchange import IngestConfig, PassportOptions
from permafrost.config.explainers import EXPLAINERS, GradCamConfig
from permafrost.config.models import ModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import require
from permafrost.core.json_entries import from_dict
from permafrost.core.progress import say_if_slow
from permafrost.core.records import PIXEL_FIELD, TOP_LOGITS, VIEW_FIELD, FieldSpec
from permafrost.core.tasks import Executor
from permafrost.exchange.diagnosis import (
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
from permafrost.exchange.ingest_shards import IngestShard
from permafrost.exchange.ingestion import IngestedTargets
from permafrost.exchange.other_inputs import (
    OtherInput,
    as_they_are,
    center_cropped,
    other_frames,
    other_sizes,
    other_values,
)
from permafrost.exchange.target_reader import TargetError
from permafrost.loading.geometry import complete_matrices
from permafrost.loading.recipes import recipe_from
from permafrost.models.fingerprint import describe_teacher
from permafrost.models.providers import with_preprocessing
from permafrost.models.resolve import resolve_network
from permafrost.models.trained_weights import DataClasses
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.fields import Values
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.manifest import Agreement, Passport, write_manifest
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.passport")

_CLOSE_COSINE = 0.02
"""1 minus a mean cosine that rounding explains."""
_WRONG = 0.5
"""Agreement below which targets without an explanation are refused."""
_DOUBTFUL = 0.9
"""Agreement below which a difference without an explanation is a warning."""
_DOUBTFUL_NATS = 0.1
"""Divergence above which it is."""
_MOST_DIAGNOSED = 512
"""Number of views that are kept to look for a cause."""
_EXACT_INPUT = 0.01
"""Median error of the outputs, relative to their spread, that another implementation of the same input explains."""
_HALF = 0.5
"""Fraction of the distance below which another reading of the same files is named."""
_TRIED = 32
"""Number of records on which the teacher is run in other ways."""


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


# ---- comparison ----------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Some records of the sample: what the teacher receives, and what is stored."""

    frames: FrameBatch
    keys: Sequence[str]
    stored: Values
    """Fields [n, V, ...]."""
    views: DrawnViews | None
    """Views of the records, None for the canonical one."""


@dataclass(frozen=True, kw_only=True)
class ComparePassport(SampleTask):
    """Task that compares a sample of stored targets with the outputs of a teacher, and writes nothing."""

    facts: TargetFacts
    source: IngestShard | RootedPath
    """Targets that are not stored yet, or the folder of a pass."""
    most_views: int
    class_names: tuple[str, ...]
    """Names of the teacher's classes, empty if they are not those of the data."""

    def measure(self, sample: Sample) -> tuple[int, str]:
        annotator = self.build_annotator()
        if self.facts.operations is None:
            is_crop = self.facts.frame == "center_crop"
            annotator = annotator.with_crop(self.facts.crop_fraction if is_crop else None)
        comparison = _Comparison(self.facts)
        tried: list[_Batch] = []
        count = 0
        for batch in self._batches(sample):
            answers = _flat(annotator.annotate([batch.frames], batch.keys, batch.views)[0])
            comparison.add(_flat(batch.stored), answers, _keys_of_views(batch))
            if count < _TRIED:
                tried.append(batch)
            count += len(batch.keys)
        agreement = comparison.agreement(count)
        causes: list[Cause] = []
        if self.facts.frame != "unknown":
            with say_if_slow(logger, "looking for what explains the difference ..."):
                causes = comparison.causes(
                    self.class_names, lambda: _other_input(annotator, tried, self.facts)
                )
        values = {"agreement": asdict(agreement), "causes": causes}
        return count, json.dumps(values)

    def _batches(self, sample: Sample) -> Iterator[_Batch]:
        for shard, records in sample:
            rows = self._rows_of(shard)[:records]
            first = self._store.rows_of_shard(self._number(shard)).start
            if self.facts.operations is None:
                # Targets of whole photographs that EXIF turns are of another image than the teacher is shown.
                turned = self._store.index.values("orientation", first + rows) != 1
                rows = rows if turned.all() else rows[~turned]
            for start in range(0, len(rows), self.config.batch_size):
                part = rows[start : start + self.config.batch_size]
                stored = self._read(shard, part)
                frames = ShardFrames(self._store, shard, part).read(0, len(part))
                keys = self._store.index.keys(first + part)
                yield _Batch(frames, keys, stored, self._views_of(stored))

    def _views_of(self, stored: Values) -> DrawnViews | None:
        if self.facts.operations is None:
            return None
        recipe = recipe_from(self.facts.operations)
        pixels = stored.get(PIXEL_FIELD)
        return DrawnViews(
            complete_matrices(torch.from_numpy(stored[VIEW_FIELD.name])),
            None if pixels is None else torch.from_numpy(pixels),
            recipe if recipe.width else None,
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
        at_rows, at_views = (each.ravel() for each in np.meshgrid(places, views, indexing="ij"))
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
    """Return the teacher's field of the same kind and shape, the deepest one of several stages; None if there is none.

    Stages of a file are numbered by nobody, so features may be those of any stage.
    """
    prefix, _, number = spec.name.rpartition("_")
    names = [spec.name]
    if number.isdigit():
        names = sorted((n for n in teacher if n.rpartition("_")[0] == prefix), reverse=True)
    return next((n for n in names if n in teacher and teacher[n].shape[2:] == spec.shape), None)


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
        self.keys: list[str] = []
        self.same_top: list[NDArray[np.bool_]] = []
        self.nats: list[NDArray[np.float64]] = []
        self.errors: list[NDArray[np.float64]] = []
        self.cosines: dict[str, list[NDArray[np.float64]]] = {}
        self._centers: dict[str, NDArray[np.float64]] = {}
        self._kept: list[tuple[Values, Values, Sequence[str]]] = []
        self._num_kept = 0

    def add(self, stored: Values, teacher: Values, keys: Sequence[str]) -> None:
        """Compare the fields of some views, [n, 1, ...] each."""
        if self._num_kept < _MOST_DIAGNOSED:
            self._kept.append((stored, teacher, keys))
            self._num_kept += len(keys)
        self.keys += keys
        if self.facts.has_logits:
            outputs = StoredOutputs(stored, self.facts.temperatures)
            logits = teacher["logits"][:, 0]
            self.same_top.append(outputs.same_top(logits))
            self.nats.append(outputs.divergence(logits))
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
                "kl_largest": float(nats.max()),
                "kl_largest_key": self.keys[int(nats.argmax())],
            }
        return Agreement(
            precision="float32",
            records=records,
            cosine_mean={name: float(c.mean()) for name, c in columns.items()},
            cosine_lowest={name: float(c.min()) for name, c in columns.items()},
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
                is_of_this_input = cause is None
            if cause is None:
                noise = find_noise(logits, outputs)
                is_of_this_input = noise is not None
                if noise is not None:
                    text = f"they have noise with a standard deviation of {noise:.2g} on each logit"
                    cause = Cause("noise", text, "save them as the teacher gives them", noise)
            if cause is not None:
                causes.append(cause)
                # Maps of the same rows, or of the same other input, differ for the same reason.
                is_of_this_input = cause.kind not in ("rows", "preprocessing")
        elif not self.nats and self.distance() > _CLOSE_COSINE:
            cause = other_input()
            if cause is not None:
                return [cause]
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
            if centered_cosines(*pair, center_of(pair[0])).mean() > 1 - _CLOSE_COSINE:
                continue
            find = find_cause_of_maps if spec.axes[-1] == "x" else find_other_rows
            cause = find(spec.name, *pair, [keys[row] for row in rows])
            if cause is not None:
                yield cause


def _explains_same(
    stored: Values, teacher: Values, order: NDArray[np.int64] | None = None
) -> NDArray[np.bool_]:
    """Return of which views both maps explain the same class, where the stored classes may have another order."""
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
    before = _compared_with(OtherInput("", "", annotator, as_they_are), batches, facts)
    assert before is not None
    search = _Search(batches, facts, before.distance())
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
    return min(search.causes, key=lambda cause: cause.left) if search.causes else None


class _Search:
    """Search for an input of the teacher that explains targets."""

    def __init__(self, batches: Sequence[_Batch], facts: TargetFacts, before: float) -> None:
        self.batches = batches
        self.facts = facts
        self.before = before
        self.causes: list[Cause] = []
        self.fractions: list[tuple[float, float]] = []
        """Distance and fraction of each center crop."""

    def explains(self, way: OtherInput, *, is_exact: bool = False) -> float:
        """Compare the targets with another input, and return their distance.

        Args:
            way: The input.
            is_exact: True if it explains the targets only where they are the same up to rounding, as what looks like
                one change of pixels may be another. Crops differ by the library that makes them.
        """
        comparison = _compared_with(way, self.batches, self.facts)
        if comparison is None:
            return float("inf")
        distance = comparison.distance()
        fraction = way.annotator.crop_fraction
        if fraction is not None:
            self.fractions.append((distance, fraction))
        close = CLOSE_NATS if self.facts.has_logits else _CLOSE_COSINE
        is_explained = distance <= close or explains(self.before, distance)
        if is_exact and comparison.errors:
            is_explained &= float(np.median(np.concatenate(comparison.errors))) < _EXACT_INPUT
        if is_explained and self.before - distance >= close:
            self.causes.append(Cause("preprocessing", way.text, way.advice, distance))
        return distance

    def refine_frame(self, annotator: TeacherAnnotator) -> None:
        """Search for the fraction of a center crop near the best of those that were tried."""

        def distance(fraction: float) -> float:
            return self.explains(center_cropped(annotator, fraction))

        best = min(self.fractions)[1]
        bounds = (max(0.1, best - 0.06), min(1.0, best + 0.06))
        result = minimize_scalar(distance, bounds=bounds, method="bounded", options={"xatol": 5e-4})
        for fraction in (round(result.x, 2), round(result.x, 3), round(64 * result.x) / 64):
            distance(fraction)


def _compared_with(
    way: OtherInput, batches: Sequence[_Batch], facts: TargetFacts
) -> _Comparison | None:
    """Compare the targets of some records with a teacher that is run in another way, None if it takes no such input."""
    comparison = _Comparison(facts)
    count = 0
    for batch in batches:
        info = BatchInfo(batch.keys, batch.frames.labels)
        inputs = (
            [way.annotator.inputs_of(batch.frames)]
            if batch.views is None
            else way.annotator.inputs_of_views(batch.frames, batch.views)
        )
        try:
            answers = [
                way.annotator.annotate_inputs(way.change(each), info).values for each in inputs
            ]
        except (RuntimeError, ValueError, AssertionError):
            return None
        teacher = {name: np.stack([each[name] for each in answers], axis=1) for name in answers[0]}
        comparison.add(_flat(batch.stored), _flat(teacher), _keys_of_views(batch))
        count += len(batch.keys)
        if count >= _TRIED:
            break
    return comparison


# ---- passports -----------------------------------------------------------------------------------


def check_ingested(
    config: IngestConfig,
    executor: Executor,
    task: IngestShard,
    targets: IngestedTargets,
    shards: Sequence[ShardEntry],
) -> Passport:
    """Compare targets with the teacher of the options before they are stored.

    Raises:
        TargetError: If another meaning of the targets fits much better than that of the options.
    """
    assert task.fields is not None
    form = targets.form
    logits = next((s.shape for s in task.fields.fields if s.name == "logits"), (0,))
    operations = form.operations
    if targets.views is not None:
        operations = tuple(targets.views.describe()[0].get("operations", ()))
    facts = TargetFacts(
        fields=task.fields.fields,
        classes=form.classes or logits[0],
        frame=str(targets.config.frame),
        crop_fraction=targets.config.crop_fraction,
        explainer=form.explainer or {},
        temperatures=form.temperatures,
        operations=operations,
    )
    teacher = config.teacher
    assert isinstance(teacher, ModelConfig)
    options, cluster = config.passport, config.cluster
    passport, causes = _compare(
        task.store, teacher, facts, task, shards, options, cluster, executor
    )
    distance = _loss(passport.agreement)
    if distance > CLOSE_NATS:
        for option, reader in targets.reader.alternatives().items():
            other = replace(task, targets=targets._replace(reader=reader))
            alternative, _ = _compare(
                task.store, teacher, facts, other, shards, options, cluster, executor
            )
            left = _loss(alternative.agreement)
            if left < _HALF * distance:
                text = f"they are closer with {option}"
                causes = [Cause("preprocessing", text, f"set {option}", left)]
    return _judged(passport, causes, options, facts, config.path)


def check_pass(
    store: Store,
    teacher_pass: TeacherPass,
    teacher: ModelConfig,
    options: PassportOptions,
    cluster: ClusterConfig,
    executor: Executor,
) -> Passport:
    """Compare a pass with a teacher, and write the passport into its manifest.

    Raises:
        TargetError: If another meaning of its targets fits much better, or they are of another network.
    """
    manifest = teacher_pass.manifest
    require(
        not manifest.views.get("mix"),
        f"store.teacher={teacher_pass.name}: its views are mixtures of two records, which a passport does not show to "
        "the teacher; name another pass",
    )
    has_views = any(spec.name == VIEW_FIELD.name for spec in manifest.fields)
    crops = [spec.crop_fraction for spec in manifest.fields if spec.crop_fraction is not None]
    described = manifest.teacher.get("format", {})
    facts = TargetFacts(
        fields=manifest.fields,
        classes=teacher_pass.num_classes,
        frame=str(manifest.teacher.get("frame")),
        crop_fraction=crops[0] if crops else described.get("crop_fraction"),
        explainer=manifest.explainer,
        temperatures=manifest.temperatures,
        operations=tuple(manifest.views.get("operations", ())) if has_views else None,
    )
    covered = [shard for shard in store.shards if teacher_pass.shards.number_of(shard.name) >= 0]
    passport, causes = _compare(
        store, teacher, facts, teacher_pass.folder, covered, options, cluster, executor
    )
    where = f"pass {teacher_pass.name}, whose manifest is as it was"
    passport = _judged(passport, causes, options, facts, where)
    write_manifest(teacher_pass.folder, replace(manifest, passport=passport))
    return passport


def _judged(
    passport: Passport,
    causes: Sequence[Cause],
    options: PassportOptions,
    facts: TargetFacts,
    where: str,
) -> Passport:
    """Return the passport of targets that are the teacher's, or whose differences are accepted.

    Raises:
        TargetError: If a cause explains that they differ, or they hardly resemble the teacher's.
    """
    agreement = passport.agreement
    stated = f"(by the options: {describe_agreement(agreement)})"
    for cause in causes:
        is_severe = cause.kind != "noise" or not _resembles(agreement, _DOUBTFUL, _DOUBTFUL_NATS)
        if cause.kind not in options.accept and is_severe:
            raise TargetError(
                f"{where}: the targets differ from those of teacher={passport.teacher}: {cause.text}; {cause.left:.2g} "
                f"{'nats' if facts.has_logits and cause.kind != 'maps' else 'of a cosine'} are left {stated}. "
                f"{cause.advice[0].upper()}{cause.advice[1:]}, or set 'passport.accept=[{cause.kind}]' to take them as "
                "they are"
            )
        logger.warning("teacher=%s: %s", passport.teacher, cause.text)
    accepted: dict[str, str] = {cause.kind: cause.text for cause in causes}
    rest = _unexplained(agreement, accepted.keys())
    if facts.frame != "unknown" and not _resembles(rest, _WRONG, float("inf")):
        if "unknown" not in options.accept:
            raise TargetError(
                f"{where}: the targets are not those of teacher={passport.teacher} {stated}, and no other meaning of "
                "them explains it; name the network that made them, or set 'passport.accept=[unknown]' to take them as "
                "they are"
            )
        accepted["unknown"] = "they differ, and the cause is unknown"
    _announce(passport, rest)
    return replace(passport, accepted=accepted)


def _unexplained(agreement: Agreement, causes: Collection[str]) -> Agreement:
    """Return the agreement without what causes of these kinds explain."""
    if {"temperature", "classes", "rows", "preprocessing", "noise"} & set(causes):
        agreement = replace(agreement, top1=None, kl_mean=None)
    if {"maps", "rows", "preprocessing"} & set(causes):
        agreement = replace(agreement, cosine_mean={})
    return agreement


def _compare(
    store: Store,
    teacher: ModelConfig,
    facts: TargetFacts,
    source: IngestShard | RootedPath,
    shards: Sequence[ShardEntry],
    options: PassportOptions,
    cluster: ClusterConfig,
    executor: Executor,
) -> tuple[Passport, list[Cause]]:
    """Run the teacher on a sample, compare, and look for the causes of differences."""
    config = resolve_network(teacher, store, "teacher")
    names = store.manifest.classes
    outputs = facts.classes or len(names)
    classes: DataClasses = names if outputs == len(names) else outputs
    payloads = _payloads(facts.fields)
    # The provider's input size and interpolation, and the part of the image that the targets say.
    config = with_preprocessing(config, outputs)
    described = describe_teacher(config, classes, reads_head="logits" in payloads)
    require(
        not facts.classes or described["classes"] == facts.classes,
        f"teacher.classes: the targets are of {facts.classes} classes, and teacher={config.name} has "
        f"{described['classes']}; name the network that made the targets",
    )
    kind = facts.explainer.get("kind")
    explainer = (
        GradCamConfig()
        if kind is None
        else EXPLAINERS[kind](
            **{n: v for n, v in facts.explainer.items() if n not in ("kind", "seed")}
        )
    )
    sizes = {spec.name: spec.shape for spec in facts.fields}
    task = ComparePassport(
        store_path=store.folder,
        teacher=config,
        classes=classes,
        explainer=explainer,
        config=PassOptions(
            payloads=payloads,
            class_map_size=sizes.get("class_maps", (0, 0, 2))[-1],
            features_mirror=False,
            features_dtype="float16",
        ),
        num_threads=cluster.threads_per_actor,
        facts=facts,
        source=source,
        most_views=options.views,
        class_names=names if outputs == len(names) else (),
    )
    count = sum(shard.records for shard in shards)
    sample = [(shard, shard.records) for shard in shards]
    if options.records is not None and options.records < count:
        sample = list(select_sample(shards, options.records))
    (result,) = executor.map_shards(task, [sample])
    values = json.loads(result.report)
    passport = Passport(
        teacher=f"{config.kind} {config.name}, {config.interpolation or 'bilinear'}, "
        f"{config.input_size or max(store.size)} pixels",
        weights_sha256=described["weights_sha256"],
        agreement=from_dict(Agreement, values["agreement"]),
    )
    return passport, [Cause(*each) for each in values["causes"]]


def _payloads(fields: Sequence[FieldSpec]) -> tuple[str, ...]:
    """Return the payloads whose fields a pass has."""
    names = {spec.name for spec in fields}
    kinds = {
        "logits": {"logits", TOP_LOGITS},
        "map": {"map"},
        "class_maps": {"class_maps"},
        "pooled": {"pooled"},
        "attention": {name for name in names if name.startswith("attention_")},
        "features": {name for name in names if name.startswith("features_")},
    }
    payloads = [kind for kind, having in kinds.items() if names & having]
    needs_logits = {"map", "class_maps"} & set(payloads) and "logits" not in payloads
    return (*(("logits",) if needs_logits else ()), *payloads)


def _loss(agreement: Agreement) -> float:
    """Return the distance of an agreement: nats, or 1 minus the mean cosine."""
    if agreement.kl_mean is not None:
        return agreement.kl_mean
    means = list(agreement.cosine_mean.values())
    return 1 - sum(means) / len(means) if means else 0.0


def _resembles(agreement: Agreement, lowest: float, nats: float) -> bool:
    """Return whether the largest logit and the cosines agree at least so far, and the divergence is at most this."""
    top1 = 1.0 if agreement.top1 is None else agreement.top1
    worst = min([top1, *agreement.cosine_mean.values()])
    return worst >= lowest and (agreement.kl_mean or 0.0) <= nats


def _announce(passport: Passport, rest: Agreement) -> None:
    """Log the agreement, as a warning if what nothing explains is low."""
    agreement = passport.agreement
    worst = "" if agreement.kl_largest_key is None else f"; worst {agreement.kl_largest_key}"
    is_doubtful = not _resembles(rest, _DOUBTFUL, _DOUBTFUL_NATS)
    differs = is_doubtful or _loss(rest) > (CLOSE_NATS if rest.top1 is not None else _CLOSE_COSINE)
    logger.log(
        logging.WARNING if is_doubtful else logging.INFO,
        "teacher=%s: %s%s%s",
        passport.teacher,
        describe_agreement(agreement),
        worst,
        "; they differ, cause unknown" if differs else "",
    )
