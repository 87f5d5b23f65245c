"""Passport of targets that were made elsewhere: the teacher that they are said to be of, run on a sample of the views.

What is stored and what the teacher says are compared: the class of the largest logit, the divergence
KL(teacher || stored) in nats, and the cosine of each map, feature and embedding. Mistakes that others have made are
tried as well: another part of the image, another order of the classes, and maps that are transposed. One that fits much
better than what the options say is named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.precision import describe_agreement, in_network_units, log_softmax
from permafrost.annotation.samples import Sample, SampleTask, select_sample
from permafrost.annotation.stored_views import DrawnViews
from permafrost.config.cluster import ClusterConfig
from permafrost.config.exchange import IngestConfig, PassportOptions
from permafrost.config.explainers import EXPLAINERS, GradCamConfig
from permafrost.config.models import ModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import require
from permafrost.core.json_entries import from_dict
from permafrost.core.records import (
    PIXEL_FIELD,
    REST_LOGITS,
    TOP_CLASS,
    TOP_LOGITS,
    VIEW_FIELD,
    FieldSpec,
)
from permafrost.core.tasks import Executor
from permafrost.exchange.ingest_shards import IngestShard
from permafrost.exchange.ingestion import IngestedTargets
from permafrost.exchange.target_reader import TargetError
from permafrost.loading.geometry import complete_matrices
from permafrost.loading.recipes import recipe_from
from permafrost.models.fingerprint import describe_teacher
from permafrost.models.providers import with_preprocessing
from permafrost.models.resolve import resolve_network
from permafrost.models.trained_weights import DataClasses
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.codecs import cosines
from permafrost.store.fields import Values
from permafrost.store.frames import ShardFrames
from permafrost.store.manifest import Agreement, Passport, write_manifest
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.passport")

_FRAMES: dict[str, float | None] = {
    "format.frame=full": None,
    "format.frame=center_crop": 0.875,
    "format.frame=center_crop format.crop_fraction=1": 1.0,
}
"""Parts of an image that teachers usually receive."""
_MUCH_BETTER = 0.5
"""Fraction of the distance below which another meaning is named."""
_CLOSE = 1e-3
"""Distance that rounding explains, in nats or as 1 minus a cosine."""
_WRONG = 0.5
"""Agreement below which targets are those of another network."""
_DOUBTFUL = 0.9
"""Agreement below which a passport is a warning."""
_DOUBTFUL_NATS = 1.0
"""Divergence above which a passport is a warning."""


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


# ---- comparison ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ComparePassport(SampleTask):
    """Task that compares a sample of stored targets with the outputs of a teacher, and writes nothing."""

    facts: TargetFacts
    source: IngestShard | RootedPath
    """Targets that are not stored yet, or the folder of a pass."""
    most_views: int

    def measure(self, sample: Sample) -> tuple[int, str]:
        annotator = self.build_annotator()
        columns: dict[str, dict[str, list[NDArray[Any]]]] = {}
        keys: list[str] = []
        count = 0
        for shard, records in sample:
            rows = self._rows_of(shard)[:records]
            for start in range(0, len(rows), self.config.batch_size):
                part = rows[start : start + self.config.batch_size]
                stored = self._read(shard, part)
                views = next(iter(stored.values())).shape[1]
                first = self._store.rows_of_shard(self._number(shard)).start
                part_keys = self._store.index.keys(first + part)
                keys += [key for key in part_keys for _ in range(views)]
                count += len(part)
                for meaning, values in self._answers(annotator, shard, part, part_keys, stored):
                    of_meaning = columns.setdefault(meaning, {})
                    for name, column in self._compare(stored, values).items():
                        of_meaning.setdefault(name, []).append(column)
        joined = {
            meaning: {name: np.concatenate(parts) for name, parts in each.items()}
            for meaning, each in columns.items()
        }
        return count, json.dumps(_summary(joined, keys, count))

    def _answers(
        self,
        annotator: TeacherAnnotator,
        shard: ShardEntry,
        rows: NDArray[np.int64],
        keys: Sequence[str],
        stored: Values,
    ) -> Iterator[tuple[str, Values]]:
        """Iterate over the teacher's values of the same views, "" first, then of other parts of the image."""
        batch = ShardFrames(self._store, shard, rows).read(0, len(rows))
        if self.facts.operations is not None:
            recipe = recipe_from(self.facts.operations)
            pixels = stored.get(PIXEL_FIELD)
            views = DrawnViews(
                complete_matrices(torch.from_numpy(stored[VIEW_FIELD.name])),
                None if pixels is None else torch.from_numpy(pixels),
                recipe if recipe.width else None,
            )
            yield "", annotator.annotate([batch], keys, views)[0]
            return
        own = self.facts.crop_fraction if self.facts.frame == "center_crop" else None
        yield "", annotator.with_crop(own).annotate([batch], keys)[0]
        for text, fraction in _FRAMES.items():
            if fraction != own:
                yield text, annotator.with_crop(fraction).annotate([batch], keys)[0]

    def _compare(self, stored: Values, values: Values) -> dict[str, NDArray[Any]]:
        """Compare views one by one: `top1`, `kl`, the cosines by field, and those of other meanings by their option."""
        compared: dict[str, NDArray[Any]] = {}
        flat = {name: each.reshape(-1, 1, *each.shape[2:]) for name, each in stored.items()}
        teacher = {name: each.reshape(-1, 1, *each.shape[2:]) for name, each in values.items()}
        if "logits" in flat or TOP_LOGITS in flat:
            compared |= _compare_logits(flat, teacher["logits"][:, 0], self.facts.temperatures)
        for spec in self.facts.fields:
            if spec.axes[-1:] not in (("x",), ("feature",), ("channel",)) or spec.name.endswith(
                "_scale"
            ):
                continue
            name = _same_field(spec, teacher)
            if name is None:
                continue
            one, other = in_network_units(teacher, name), in_network_units(flat, spec.name)
            if spec.name == "map":
                same = (teacher["explained_class"] == flat["explained_class"])[:, 0]
                one, other = one[same], other[same]
            compared[spec.name] = cosines(one, other)
            if spec.axes[-1:] == ("x",) and one.shape[-1] == one.shape[-2]:
                compared[f"{spec.name} transposed"] = cosines(one.swapaxes(-1, -2), other)
        return compared

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


def _compare_logits(
    stored: Values, logits: NDArray[np.generic], temperatures: Sequence[float]
) -> dict[str, NDArray[Any]]:
    """Compare logits [n, K] of the teacher with stored ones, and again with the classes of both in descending order."""
    if "logits" in stored:
        one, other = log_softmax(logits), log_softmax(stored["logits"][:, 0])
        top1 = one.argmax(axis=1) == other.argmax(axis=1)
    else:
        tau = temperatures[0]
        classes = stored[TOP_CLASS][:, 0].astype(np.int64)
        whole = log_softmax(logits.astype(np.float64) / tau)
        top1 = whole.argmax(axis=1) == classes[:, 0]
        one = np.take_along_axis(whole, classes, axis=1)
        other = stored[TOP_LOGITS][:, 0].astype(np.float64) / tau
        ordered = -np.sort(-whole, axis=1)[:, : classes.shape[1]]
        if classes.shape[1] < whole.shape[1]:
            other = np.concatenate([other, stored[REST_LOGITS][:, 0, :1]], axis=1)
            one, ordered = _with_rest(one), _with_rest(ordered)
        other = log_softmax(other)
        return {
            "top1": top1,
            "kl": _divergence(one, other),
            "another order of the classes": _divergence(ordered, other),
        }
    in_order = (-np.sort(-each, axis=1) for each in (one, other))
    return {
        "top1": top1,
        "kl": _divergence(one, other),
        "another order of the classes": _divergence(*in_order),
    }


def _with_rest(log_probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    rest = np.log(np.maximum(1 - np.exp(log_probabilities).sum(axis=1, keepdims=True), 1e-12))
    return np.concatenate([log_probabilities, rest], axis=1)


def _divergence(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.maximum((np.exp(one) * (one - other)).sum(axis=1), 0.0))


def _summary(
    columns: Mapping[str, Mapping[str, NDArray[Any]]], keys: Sequence[str], records: int
) -> dict[str, Any]:
    """Return the agreement, and the distances of other meanings that are much smaller."""
    stated = columns.get("", {})
    if not any(len(column) for column in stated.values()):
        raise TargetError(
            "teacher= has no output of the kinds and shapes of these targets, so nothing was compared; name the "
            "network that made them, and with format.fields= what the arrays are (logits, pooled, ...)"
        )
    cosine = {n: c for n, c in stated.items() if not _is_other(n) and n not in ("top1", "kl")}
    of_logits: dict[str, Any] = {}
    if "kl" in stated:
        of_logits = {
            "top1": float(stated["top1"].mean()),
            "kl_mean": float(stated["kl"].mean()),
            "kl_largest": float(stated["kl"].max()),
            "kl_largest_key": keys[int(stated["kl"].argmax())],
        }
    agreement = Agreement(
        precision="float32",
        records=records,
        cosine_mean={name: float(c.mean()) for name, c in cosine.items() if len(c)},
        cosine_lowest={name: float(c.min()) for name, c in cosine.items() if len(c)},
        **of_logits,
    )
    distance = _distance(stated)
    better = {
        text: other
        for text, each in columns.items()
        if text and _is_much_better(other := _distance(each), distance)
    }
    for name, column in stated.items():
        # Sorted logits are always closer, so classes are doubted only where no other part of the image explains it.
        is_classes = not name.endswith("transposed")
        if not _is_other(name) or not len(column) or (is_classes and better):
            continue
        is_map = name.endswith("transposed")
        here = 1 - stated[name.rpartition(" ")[0]].mean() if is_map else stated["kl"].mean()
        other = float(1 - column.mean() if is_map else column.mean())
        if _is_much_better(other, float(here)):
            better[name] = other
    return {"agreement": asdict(agreement), "alternatives": better}


def _require_same(passport: Passport, frame: str) -> None:
    """Raise TargetError if the targets cannot be of the teacher."""
    agreement = passport.agreement
    top1 = 1.0 if agreement.top1 is None else agreement.top1
    lowest = min([top1, *agreement.cosine_mean.values()])
    if lowest < _WRONG and frame != "unknown":
        raise TargetError(
            f"the targets are not those of teacher={passport.teacher}: {describe_agreement(agreement)}; name the "
            "network that made them, or leave out teacher= to take them as they are"
        )


def _is_much_better(distance: float, stated: float) -> bool:
    return distance < _MUCH_BETTER * stated and stated - distance > _CLOSE


def _is_other(name: str) -> bool:
    return " " in name


def _distance(columns: Mapping[str, NDArray[Any]]) -> float:
    """Return the mean divergence, or without logits 1 minus the mean cosine of all fields."""
    if "kl" in columns:
        return float(columns["kl"].mean())
    means = [1 - c.mean() for name, c in columns.items() if not _is_other(name) and len(c)]
    return float(np.mean(means)) if means else 0.0


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
    passport = _compare(
        task.store, teacher, facts, task, shards, config.passport, config.cluster, executor
    )
    others = {}
    for option, reader in targets.reader.alternatives().items():
        other = replace(task, targets=targets._replace(reader=reader))
        found = _compare(
            task.store, teacher, facts, other, shards, config.passport, config.cluster, executor
        )
        others[option] = found.agreement
    here = passport.agreement
    for option, agreement in others.items():
        if _is_much_better(_loss(agreement), _loss(here)):
            passport.alternatives[option] = _loss(agreement)
    if passport.alternatives:
        raise TargetError(
            f"{config.path}: the targets agree with teacher={passport.teacher} much better by another meaning: "
            f"{_in_words(passport)}, in place of {_loss(here):.3g} (the options': {describe_agreement(here)}). Correct "
            "the option, or the order of the classes, or leave out teacher= to take the targets as they are"
        )
    _require_same(passport, facts.frame)
    _announce(passport)
    return passport


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
    passport = _compare(
        store, teacher, facts, teacher_pass.folder, covered, options, cluster, executor
    )
    if passport.alternatives:
        raise TargetError(
            f"pass {teacher_pass.name} agrees with teacher={passport.teacher} much better by another meaning: "
            f"{_in_words(passport)}, in place of {_loss(passport.agreement):.3g}; its manifest is as it was. Ingest it "
            "again with the option that fits"
        )
    _require_same(passport, facts.frame)
    _announce(passport)
    write_manifest(teacher_pass.folder, replace(manifest, passport=passport))
    return passport


def _compare(
    store: Store,
    teacher: ModelConfig,
    facts: TargetFacts,
    source: IngestShard | RootedPath,
    shards: Sequence[ShardEntry],
    options: PassportOptions,
    cluster: ClusterConfig,
    executor: Executor,
) -> Passport:
    """Run the teacher on a sample and compare."""
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
    )
    count = sum(shard.records for shard in shards)
    sample = [(shard, shard.records) for shard in shards]
    if options.records is not None and options.records < count:
        sample = list(select_sample(shards, options.records))
    (result,) = executor.map_shards(task, [sample])
    values = json.loads(result.report)
    return Passport(
        teacher=f"{config.kind} {config.name}, {config.interpolation or 'bilinear'}, "
        f"{config.input_size or max(store.size)} pixels",
        weights_sha256=described["weights_sha256"],
        agreement=from_dict(Agreement, values["agreement"]),
        alternatives=values["alternatives"],
    )


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


def _in_words(passport: Passport) -> str:
    return ", ".join(f"{text} ({value:.3g})" for text, value in passport.alternatives.items())


def _announce(passport: Passport) -> None:
    """Log the agreement, as a warning if it is doubtful."""
    agreement = passport.agreement
    top1 = 1.0 if agreement.top1 is None else agreement.top1
    lowest = min([top1, *agreement.cosine_mean.values()])
    worst = "" if agreement.kl_largest_key is None else f"; worst {agreement.kl_largest_key}"
    is_doubtful = lowest < _DOUBTFUL or (agreement.kl_mean or 0) > _DOUBTFUL_NATS
    logger.log(
        logging.WARNING if is_doubtful else logging.INFO,
        "%steacher=%s: %s%s",
        "warning: low agreement with " if is_doubtful else "",
        passport.teacher,
        describe_agreement(agreement),
        worst,
    )
