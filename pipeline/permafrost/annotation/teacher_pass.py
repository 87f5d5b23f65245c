"""A teacher pass from plan to publication: its identity, its missing shards and their annotation.

A fingerprint covers everything that changes the numbers (data, weights, architecture, preprocessing, explainer,
payloads, views) and excludes everything that does not (library versions, device, actors, batch size).
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.feature_projections import FitProjections, fit_projections
from permafrost.annotation.moved_features import (
    MeasureMovedFeatures,
    describe_moved_features,
    measure_moved_features,
)
from permafrost.annotation.precision import (
    ComparePrecision,
    PrecisionError,
    compare_precision,
    describe_agreement,
    describe_shortfall,
)
from permafrost.annotation.samples import SampleTask
from permafrost.annotation.shard_tasks import AnnotateShard, Correct, count_correct
from permafrost.annotation.stored_views import StoredViews, plan_stored_views
from permafrost.annotation.teacher_check import (
    CheckTeacher,
    check_teacher,
    needs_float32,
    require_sound,
)
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.runs import run_folder, save_cost
from permafrost.config.store import (
    PAYLOADS,
    PROJECTION_RECORDS,
    LogitsDtype,
    PassOptions,
    PassPrecision,
)
from permafrost.config.verbs import PrecomputeConfig
from permafrost.config.version import __version__
from permafrost.core.addresses import is_address
from permafrost.core.errors import require
from permafrost.core.files import SHORT, remove_partial_files, sha256_json
from permafrost.core.records import FEATURES, TOP_CLASS
from permafrost.core.rooted_paths import RootedPath, exists, list_folder
from permafrost.core.tasks import MapShards, ShardResult, ShardTask, run_shards
from permafrost.models.explanations import pass_precision, resolve_explainer
from permafrost.models.fingerprint import describe_teacher
from permafrost.models.providers import build_model, count_parameters
from permafrost.models.trained_weights import check_weights
from permafrost.sources.image_files import escape_key
from permafrost.store.backends import BACKENDS
from permafrost.store.manifest import (
    CANONICAL_VIEW,
    MANIFEST_NAME,
    TEACHERS_FOLDER,
    Agreement,
    MovedFeatures,
    StoreManifest,
    read_pass_manifest,
)
from permafrost.store.projections import (
    check_projections,
    describe_projections,
    read_projections,
)
from permafrost.store.publish import needs_publishing
from permafrost.store.publish_pass import missing_pass_shards, publish_pass
from permafrost.store.reader import Store
from permafrost.store.receipts import RECEIPTS_FOLDER
from permafrost.store.shards import ShardEntry

_SampleTask = TypeVar("_SampleTask", bound=SampleTask)
_CANONICAL: tuple[dict[str, Any], None] = (
    {"count": 1, "sampler": CANONICAL_VIEW, "seed": 0},
    None,
)


def describe_explainer(config: ExplainerConfig) -> dict[str, Any]:
    """Describe the options that determine a pass's maps. Options that are not read are left out."""
    options = asdict(config)
    if config.max_classes is None:
        del options["max_classes"]
    if config.explained_classes != "sample_gt":
        del options["seed"]
    return options


def describe_pass(
    store: StoreManifest,
    teacher: dict[str, Any],
    explainer: ExplainerConfig,
    config: PassOptions,
    backend: str,
    views: StoredViews | None = None,
    network: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe everything that a pass's fingerprint covers, in the form of its manifest.

    views    stored views, None for the canonical view of every record
    network  what payloads say about the teacher (PayloadInfo.describe)
    """
    seen, selection = _CANONICAL if views is None else views.describe()
    only_where_read: dict[str, Any] = {
        option: getattr(config, option)
        for name in config.payloads
        for option in config.read_by(name)
    }
    return {
        "dataset_fingerprint": store.dataset.fingerprint,
        "store_fingerprint": store.fingerprint,
        "selection": selection,
        "teacher": teacher,
        "views": seen,
        "explainer": describe_explainer(explainer) if "map" in config.payloads else {},
        "payloads": sorted(config.payloads),
        "backend": backend,
        **only_where_read,
        **(network or {}),
    }


def fingerprint_pass(description: dict[str, Any]) -> str:
    """Fingerprint of the result of `describe_pass`."""
    return sha256_json(description)


# ---- teacher pass ----------------------------------------------------------------------------------


logger = logging.getLogger("permafrost.precompute")

_AUTOMATIC: tuple[PassPrecision, ...] = ("float32", "bfloat16")
"""Precisions of precision=auto; a pass of the first is preferred if the store has both."""


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """The plan of a pass: its identity, its folder, the shards that it covers and those that are missing."""

    store: Store
    teacher: ModelConfig
    explainer: ExplainerConfig
    description: dict[str, Any]
    """Description in the pass's manifest, covered by the fingerprint."""
    fingerprint: str
    folder: RootedPath
    shards: Sequence[ShardEntry]
    missing: list[ShardEntry]
    views: StoredViews | None
    """Stored views, None for the canonical view of every record."""

    @property
    def precision(self) -> PassPrecision:
        """Precision of the teacher's forward pass."""
        return cast("PassPrecision", self.description["teacher"]["dtype"])

    @property
    def logits_dtype(self) -> LogitsDtype:
        """Storage dtype of the logits."""
        return cast("LogitsDtype", self.description.get("logits_dtype", "float16"))

    @property
    def is_unfinished(self) -> bool:
        """True if shards or the manifest are missing."""
        return bool(self.missing) or needs_publishing(self.folder)

    @property
    def num_classes(self) -> int:
        """Number of classes of the store."""
        return len(self.store.manifest.classes)

    @property
    def num_views(self) -> int:
        """Number of views per record, with one forward pass each."""
        return 1 if self.views is None else self.views.count

    def summary(self) -> str:
        """Name of the finished pass, and its bytes per record."""
        stored = self.store.open_pass(self.folder.name, stored_views=self.views is not None)
        return f"{self.folder.name} ({stored.bytes_per_record:,.0f} bytes a record)"

    @property
    def rows_per_chunk(self) -> int:
        """Maximum number of records of a shard in this pass."""
        if self.views is None:
            return self.store.manifest.rows_per_shard
        rows = (self.views.rows_of(self.store, shard) for shard in self.shards)
        return max(map(len, rows))


class Annotation(NamedTuple):
    """Work of a call of `annotate_passes`."""

    forward_passes: int
    """Number of records, each counted once for each of its views."""
    canonical: str
    """Name of the canonical pass."""
    passes: list[str]
    """Names of all passes of this call with their bytes per record."""
    accuracy: dict[str, float]
    """Top-1 accuracy of the teacher by split, in [0, 1]; empty if this call computed nothing, if records have several
    labels or none, and if the teacher's classes are not those of the store."""


def annotate_passes(config: PrecomputeConfig, store: Store, map_shards: MapShards) -> Annotation:
    """Finish and publish the canonical pass and, if `views=` requests one, the pass of stored views."""
    requested: list[StoredViews | None] = [None]
    if config.views.kind != "canonical":
        requested.append(
            plan_stored_views(store, config.views, config.augment, config.split, config.subset)
        )
    plans = [plan_pass(config, store, views) for views in requested]
    agreement, is_auto = None, config.annotate.precision == "auto"
    if any(plan.is_unfinished for plan in plans):
        config = _settle_logits(config, plans[0], map_shards)
        config, agreement = _settle_precision(config, plans[0], map_shards)
        if config.annotate.logits_dtype != plans[0].logits_dtype or (
            is_auto and config.annotate.precision != plans[0].precision
        ):
            plans = [plan_pass(config, store, views) for views in requested]
    made = [annotate_pass(plan, config, map_shards, agreement) for plan in plans]
    return Annotation(
        forward_passes=sum(annotated for annotated, _ in made),
        canonical=plans[0].folder.name,
        passes=[plan.summary() for plan in plans],
        accuracy=made[0][1],
    )


def _settle_logits(
    config: PrecomputeConfig, plan: PassPlan, map_shards: MapShards
) -> PrecomputeConfig:
    """Look at the teacher before a new pass, and return the options with the dtype of its logits.

    plan  its plan, if logits_dtype=auto with that of what exists of it
    Raises TeacherError for outputs that cannot be what the options say.
    """
    dtype = config.annotate.logits_dtype
    if _has_shards(plan.folder):
        dtype = plan.logits_dtype if dtype == "auto" else dtype
    elif config.annotate.reads_head:
        check = check_teacher(map_shards, _sample_task(CheckTeacher, plan, config), plan.shards)
        if check is not None:
            manifest = plan.store.manifest
            require_sound(
                check,
                outputs=getattr(plan.teacher, "outputs", "logits"),
                classes=manifest.classes,
                has_many_labels=manifest.multi_label,
            )
        reason = "" if check is None else needs_float32(check)
        if reason and dtype == "auto":
            logger.info("annotate.logits_dtype=auto: float32, because %s", reason)
            dtype = "float32"
        elif reason and dtype == "float16":
            logger.warning(
                "annotate.logits_dtype=float16: %s; float32 stores them as they are", reason
            )
    settled = "float16" if dtype == "auto" else dtype
    return replace(config, annotate=replace(config.annotate, logits_dtype=settled))


def _settle_precision(
    config: PrecomputeConfig, plan: PassPlan, map_shards: MapShards
) -> tuple[PrecomputeConfig, Agreement | None]:
    """Return the options with the precision of a pass that is not finished, and its agreement with float32.

    plan  its plan, if precision=auto with the precision of what exists of it
    The agreement is None if it was not measured. Raises PrecisionError if the options name a precision in which a
    sample of the records is too far from float32.
    """
    asked = config.annotate.precision
    precision = asked
    if asked == "auto" and _has_shards(plan.folder):
        precision = plan.precision
        logger.info("annotate.precision=auto: %s, as in %s", precision, plan.folder)
    lower = replace(config.annotate, precision="bfloat16")
    if precision == "float32" or pass_precision(lower, plan.explainer) == "float32":
        precision = "float32" if precision == "auto" else precision
        return _with_precision(config, precision), None
    task = _sample_task(ComparePrecision, plan, _with_precision(config, precision))
    found, agreement = compare_precision(map_shards, task, plan.shards)
    if agreement is None:
        return _with_precision(config, found), None
    shortfall = describe_shortfall(agreement)
    if not shortfall:
        logger.info(
            "annotate.precision=%s against float32: %s", found, describe_agreement(agreement)
        )
        return _with_precision(config, found), agreement
    if precision == "auto":
        logger.info("annotate.precision=auto: float32, because with %s %s", found, shortfall)
        return _with_precision(config, "float32"), None
    raise PrecisionError(
        f"annotate.precision={precision}: in a sample of {agreement.records} records {shortfall}; set "
        "annotate.precision=float32"
    )


def _with_precision(config: PrecomputeConfig, precision: PassPrecision) -> PrecomputeConfig:
    return replace(config, annotate=replace(config.annotate, precision=precision))


def _sample_task(
    kind: type[_SampleTask], plan: PassPlan, config: PrecomputeConfig, **attributes: Any
) -> _SampleTask:
    """Build a task that measures a sample of the pass's records."""
    return kind(
        store_path=plan.store.folder,
        teacher=plan.teacher,
        num_classes=plan.num_classes,
        explainer=plan.explainer,
        config=config.annotate,
        num_threads=config.cluster.threads_per_actor,
        **attributes,
    )


def _options_for(config: PrecomputeConfig, views: StoredViews | None) -> PrecomputeConfig:
    """Return the options of the pass of these views. Stored views need no border and no mirror images."""
    if views is None:
        return config
    return replace(
        config, annotate=replace(config.annotate, features_mirror=False, features_margin=0.0)
    )


def plan_pass(config: PrecomputeConfig, store: Store, views: StoredViews | None = None) -> PassPlan:
    """Plan the pass that the options describe. Raises ConfigError if teacher or explainer do not fit the store.

    With precision=auto it is the pass of float32 or of bfloat16 that the store has, and that of float32 if it has
    neither; with logits_dtype=auto likewise that of float16 or float32.
    """
    config = _options_for(config, views)
    assert not isinstance(config.teacher, NoModelConfig)
    num_classes = len(store.manifest.classes)
    require(
        bool(config.teacher.classes or num_classes) or not config.annotate.reads_head,
        f"the records of {store.path} have no classes; set teacher.classes to the number of the teacher's outputs, or "
        "store what needs none, as in annotate.payloads=[pooled]",
    )
    explainer = resolve_explainer(config.explainer, store, config.teacher.classes or num_classes)
    check_weights(config.teacher, "teacher", store.manifest.classes)
    description = describe_pass(
        store.manifest,
        describe_teacher(config.teacher, num_classes, reads_head=config.annotate.reads_head),
        explainer,
        config.annotate,
        config.store.backend,
        views,
        _described_network(config, config.teacher, num_classes),
    )
    if FEATURES in config.annotate.payloads and config.annotate.features_channels is not None:
        description["projection"] = {"split": config.split, "records": PROJECTION_RECORDS}
    name = escape_key(config.annotate.name or config.teacher.name)
    plans = []
    for options in _alternatives(config.annotate):
        dtype = pass_precision(options, explainer)
        described = description | {"teacher": description["teacher"] | {"dtype": dtype}}
        if "logits_dtype" in options.read_by("logits") and options.reads_head:
            described["logits_dtype"] = options.logits_dtype
        fingerprint = fingerprint_pass(described)
        # A pass keeps the name that it was given when it was begun.
        folders = list_folder(store.folder / TEACHERS_FOLDER, f"*-{fingerprint[:SHORT]}")
        plans.append((described, fingerprint, folders))
    # A call that failed before its first shard may have left a folder of another alternative.
    begun = (plan for plan in plans if plan[2] and _has_shards(plan[2][0]))
    description, fingerprint, folders = next(begun, plans[0])
    new = store.folder / TEACHERS_FOLDER / f"{name}-{fingerprint[:SHORT]}"
    folder = folders[0] if folders else new
    shards = store.shards if views is None else [store.shards[n] for n in views.shards.tolist()]
    return PassPlan(
        store=store,
        teacher=config.teacher,
        explainer=explainer,
        description=description,
        fingerprint=fingerprint,
        folder=folder,
        shards=shards,
        missing=missing_pass_shards(folder, shards),
        views=views,
    )


def _alternatives(options: PassOptions) -> Iterator[PassOptions]:
    """Iterate over the options that `auto` may mean, the preferred ones first."""
    asked = options.logits_dtype
    dtypes: tuple[LogitsDtype, ...] = ("float16", "float32") if asked == "auto" else (asked,)
    precisions = _AUTOMATIC if options.precision == "auto" else (options.precision,)
    for dtype in dtypes:
        for precision in precisions:
            yield replace(options, precision=precision, logits_dtype=dtype)


def _has_shards(folder: RootedPath) -> bool:
    """Return whether a shard of the pass was finished in an earlier call."""
    return exists(folder / MANIFEST_NAME) or bool(list_folder(folder / RECEIPTS_FOLDER))


def annotate_pass(
    plan: PassPlan,
    config: PrecomputeConfig,
    map_shards: MapShards,
    agreement: Agreement | None = None,
) -> tuple[int, dict[str, float]]:
    """Write the missing shards of a pass, and publish it.

    config     with the precision of the pass
    agreement  of that precision with float32
    Returns the number of forward passes of this call, and the teacher's accuracy by split; without any work, and for
    records that it cannot be computed on, (0, {}).
    """
    if not plan.is_unfinished:
        agreement = read_pass_manifest(plan.folder).agreement
        lower = "" if agreement is None else f" ({plan.precision}: {describe_agreement(agreement)})"
        logger.info("%s is complete%s", plan.folder, lower)
        return 0, {}
    config = _options_for(config, plan.views)
    if plan.precision != config.annotate.precision:
        logger.info(
            "annotate.precision=%s: maps of explainer=%s are gradients through the whole network in %s, so the logits "
            "are taken from that pass too",
            config.annotate.precision,
            plan.explainer.kind,
            plan.precision,
        )
    # The driver builds the network once for the names and shapes of its fields. Each actor builds its own.
    eager = replace(config.annotate, compile=False)
    _fit_projections(plan, config, map_shards)
    annotator = TeacherAnnotator(
        plan.teacher, plan.num_classes, plan.explainer, eager, plan.store.size
    ).with_projections(read_projections(plan.folder))
    specs = annotator.fields(stored_views=plan.views is not None)
    logger.info(
        "teacher %s: %s of %d shards, %s already done, into %s",
        plan.teacher.name,
        ", ".join(spec.name for spec in specs),
        len(plan.shards),
        len(plan.shards) - len(plan.missing),
        plan.folder,
    )
    remove_partial_files(plan.folder)
    fields = BACKENDS[config.store.backend](
        plan.folder, tuple(specs), len(plan.shards), plan.rows_per_chunk, plan.num_views
    )
    shared_files = fields.create()
    task = AnnotateShard(
        store_path=plan.store.folder,
        folder=plan.folder,
        fields=fields,
        fingerprint=plan.fingerprint,
        teacher=plan.teacher,
        num_classes=plan.num_classes,
        explainer=plan.explainer,
        config=config.annotate,
        num_threads=config.cluster.threads_per_actor,
        decode_threads=config.cluster.decode_threads,
        views=plan.views,
    )
    counts: dict[str, Correct] = {}

    def map_and_count(task: ShardTask, shards: Sequence[ShardEntry]) -> Iterator[ShardResult]:
        for result in map_shards(task, shards):
            counts[result.name] = Correct(result.labeled, result.correct)
            yield result

    annotated, seconds = run_shards("teacher", map_and_count, task, plan.missing)
    save_cost(run_folder(config.run) / "precompute", seconds, annotated)
    moved_features = _measure_moved_features(plan, config, map_shards)
    publish_pass(
        plan.folder,
        plan.shards,
        plan.description,
        plan.fingerprint,
        specs,
        shared_files,
        _made_with(plan, annotator, compiled=config.annotate.compile),
        agreement,
        moved_features,
    )
    return annotated * plan.num_views, _accuracy(plan, counts)


def _fit_projections(plan: PassPlan, config: PrecomputeConfig, map_shards: MapShards) -> None:
    """Write the projections of the features, if the options ask for any that do not exist.

    Raises ManifestError if they are not those of a published pass.
    """
    if "projection" not in plan.description:
        return
    published = exists(plan.folder / MANIFEST_NAME)
    listed = read_pass_manifest(plan.folder).projections if published else {}
    # All of them are written before the first shard.
    is_begun = published or len(plan.missing) < len(plan.shards)
    if is_begun and read_projections(plan.folder).keys() >= listed.keys():
        return
    task = _sample_task(FitProjections, plan, config, folder=plan.folder)
    fit_projections(map_shards, task, plan.store.shards, config.split)
    check_projections(plan.folder, listed)
    for field, entry in describe_projections(plan.folder).items():
        logger.info(
            "%s: %d components of %d channels keep %.1f%% of their variance",
            field,
            config.annotate.features_channels,
            entry.channels,
            100 * entry.kept,
        )


def _measure_moved_features(
    plan: PassPlan, config: PrecomputeConfig, map_shards: MapShards
) -> MovedFeatures | None:
    """Measure the error of moved features, None if the pass has none that are moved."""
    if FEATURES not in config.annotate.payloads or plan.views is not None:
        return None
    task = _sample_task(MeasureMovedFeatures, plan, config, folder=plan.folder)
    moved = measure_moved_features(map_shards, task, plan.shards)
    if moved is not None:
        logger.info(
            "moved with a view, features miss of the teacher's variance: %s",
            describe_moved_features(moved),
        )
    return moved


def _accuracy(plan: PassPlan, counts: Mapping[str, Correct]) -> dict[str, float]:
    """Compute the teacher's accuracy by split, empty for stored views and for classes of its own.

    counts  of the shards of this call, by name; those of an earlier call are counted here
    """
    if plan.views is not None:
        return {}
    made = plan.store.open_pass(plan.folder.name)
    if not made.manifest.has_logits:
        return {}
    sums: dict[str, Correct] = {}
    for shard in plan.shards:
        found = counts.get(shard.name)
        if found is None:
            rows = np.arange(shard.records)
            name = TOP_CLASS if made.manifest.temperatures else "logits"
            values = made.open_shard(shard, (name,))[name][rows, np.zeros_like(rows)]
            found = count_correct(plan.store, shard, {name: values[:, None]}, made.num_classes)
        before = sums.get(shard.split, Correct(0, 0))
        sums[shard.split] = Correct(*map(sum, zip(before, found, strict=True)))
    return {split: c.correct / c.labeled for split, c in sums.items() if c.labeled}


def _made_with(plan: PassPlan, annotator: TeacherAnnotator, *, compiled: bool) -> dict[str, str]:
    """Versions, device, size and weights: a relative path as it was typed, or the name of a file elsewhere."""
    path = Path(str(plan.teacher.weights))
    is_elsewhere = path.is_absolute() or is_address(str(plan.teacher.weights))
    weights = path.name if is_elsewhere else path.as_posix()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "permafrost": __version__,
        "torch": torch.__version__,
        "device": device,
        "weights": weights,
        "parameters": f"{count_parameters(annotator.model.network):,}",
        **({"memory_format": "channels_last"} if annotator.settings.channels_last else {}),
        **({"compiler": "torch.compile"} if compiled else {}),
    }


def _described_network(
    config: PrecomputeConfig, teacher: ModelConfig, num_classes: int
) -> dict[str, Any]:
    """Return what the payloads say about the teacher. Raises ConfigError if it cannot produce one of them."""
    functions = [PAYLOADS[name].describe for name in config.annotate.payloads]
    if not any(functions):
        return {}
    network = build_model(teacher, num_classes)
    described: dict[str, Any] = {}
    for function in filter(None, functions):
        described |= pkgutil.resolve_name(function)(network)
    return described
