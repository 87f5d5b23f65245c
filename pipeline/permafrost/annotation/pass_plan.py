"""The plan of a teacher pass: its folder, and the shards that are missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, cast

from permafrost.annotation.pass_identity import describe_network, describe_pass, fingerprint_pass
from permafrost.annotation.stored_views import StoredViews, requested_views
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.store import (
    PROJECTION_RECORDS,
    LogitsDtype,
    PassOptions,
    PassPrecision,
    PrecomputeConfig,
)
from permafrost.core.digests import SHORT
from permafrost.core.errors import require
from permafrost.core.records import FEATURES, escape_key
from permafrost.models.explanations import pass_precision, resolve_explainer
from permafrost.models.network import Network
from permafrost.storage.files import file_at
from permafrost.storage.local_files import PARTIAL_SUFFIX
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit import needs_commit
from permafrost.store.commit_markers import COMMITS_FOLDER, MARKER_SUFFIX
from permafrost.store.commit_pass import missing_pass_shards
from permafrost.store.manifest import MANIFEST_NAME, TEACHERS_FOLDER, Agreement
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.precompute")

BEGUN_NAME = f".begun{PARTIAL_SUFFIX}"
"""File of a pass that a task of a job array has begun, with what `auto` means; not empty once features are fitted."""

_MIN_TIMES_LARGER = 2
"""Pixels of a frame's side per pixel of a teacher's input, above which pixels are missed."""
_AUTOMATIC: tuple[PassPrecision, ...] = ("float32", "bfloat16")
"""Precisions of precision=auto; a pass of the first is preferred if the store has both."""


@dataclass(frozen=True, kw_only=True)
class PassTeacher:
    """The teacher of passes over a store, and how they explain it."""

    config: PrecomputeConfig
    """Options of the command."""
    store: Store
    teacher: ModelConfig
    classes: Sequence[str]
    """Names of the classes that the store had when the teacher was trained, at least those of its first generation."""
    explainer: ExplainerConfig
    added: dict[str, Any]
    """Part of the description of a pass that outputs state of the teacher."""


@dataclass(frozen=True, kw_only=True)
class PassPlan(PassTeacher):
    """The plan of a pass: its identity, its folder, the shards that it covers and those that are missing."""

    options: PassOptions
    """Options of the pass, of which none is `auto`."""
    description: dict[str, Any]
    """Description in the pass's manifest, covered by the fingerprint."""
    fingerprint: str
    folder: RootedPath
    shards: Sequence[ShardEntry]
    missing: list[ShardEntry]
    views: StoredViews | None
    """Stored views, None for the canonical view of every record."""
    agreement: Agreement | None = None
    """Agreement of its precision with float32, None if it was not measured."""
    first: PassPlan | None = None
    """Plan of the pass over the first generation that this one follows; None for that one."""

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
        return bool(self.missing) or needs_commit(self.folder)

    @property
    def num_views(self) -> int:
        """Number of views per record, with one forward pass each."""
        return 1 if self.views is None else self.views.count

    def bytes_per_record(self) -> float:
        """Return the mean bytes of a record of the finished pass."""
        return self.store.part_of_pass(self.folder).bytes_per_record

    @property
    def rows_per_chunk(self) -> int:
        """Maximum number of records of a shard in this pass."""
        if self.views is None:
            return self.store.manifest.rows_per_shard
        return max(map(len, (self.views.rows_of(self.store, shard) for shard in self.shards)))


@dataclass(frozen=True, kw_only=True)
class PassRequest(PassTeacher):
    """The passes of a teacher over a store that options ask for, in any of the precisions that `auto` allows."""

    network: Network
    """The teacher with its weights, whose digest is computed once."""
    described: dict[str, Any]
    """Description of the teacher."""

    def warn_of_aliasing(self) -> None:
        """Warn of a teacher whose inputs are much smaller than the frames, so that it misses pixels."""
        side = self.network.input_size
        size = self.store.size
        if not self.store.form.has_places or side is None or max(size) <= _MIN_TIMES_LARGER * side:
            return
        logger.warning(
            "the teacher receives frames of %dx%d at %dx%d, resized bilinearly and without antialiasing; if its "
            "accuracy is lower than expected, pack a store with store.image_size=%d",
            *size,
            side,
            side,
            side,
        )

    def existing_options(self) -> PassOptions | None:
        """Return the options of the canonical pass of which a shard was finished in an earlier call, None without one.

        If the store has several, that of the first of `auto`'s alternatives is returned.
        """
        # A call that failed before its first shard may have left a folder of another alternative.
        alternatives = (self.plan(options) for options in _alternatives(self.config.annotate))
        return next((plan.options for plan in alternatives if _has_shards(plan.folder)), None)

    def plan(self, options: PassOptions, views: StoredViews | None = None) -> PassPlan:
        """Plan a pass.

        Args:
            options: Options of the pass, of which none is `auto`.
            views: Stored views, None for the canonical view of every record.
        """
        if views is not None:  # which need no border and no horizontal flips
            options = replace(options, features_mirror=False, features_margin=0.0)
        store, config = self.store, self.config
        description = describe_pass(
            store.manifest,
            self.described | {"dtype": pass_precision(options, self.explainer)},
            self.explainer,
            options,
            config.store.backend,
            views,
            self.added,
        )
        if FEATURES in options.outputs and options.features_channels is not None:
            description["projection"] = {"split": config.split, "records": PROJECTION_RECORDS}
        fingerprint = fingerprint_pass(description)
        # A pass keeps the name that it was given when it was begun.
        folders = file_at(store.folder / TEACHERS_FOLDER).paths(f"*-{fingerprint[:SHORT]}")
        name = escape_key(config.annotate.name or PurePath(config.teacher.name).name)
        new = store.folder / TEACHERS_FOLDER / f"{name}-{fingerprint[:SHORT]}"
        folder = folders[0] if folders else new
        shards = (
            store.shards
            if views is None
            else [store.shards[number] for number in views.shards.tolist()]
        )
        return PassPlan(
            config=config,
            options=options,
            store=store,
            teacher=self.teacher,
            classes=self.classes,
            explainer=self.explainer,
            description=description,
            added=self.added,
            fingerprint=fingerprint,
            folder=folder,
            shards=shards,
            missing=missing_pass_shards(folder, shards),
            views=views,
        )

    def following(self, first: PassPlan, store: Store) -> PassPlan:
        """Plan the pass over a further generation that has the options of one over the first generation.

        Args:
            first: Plan of that pass.
            store: The further generation.

        Raises:
            ConfigError: If it would store the views of a selection.
        """
        views = first.views and requested_views(first.config, store)
        require(
            views is None or not (first.config.subset.shots or first.config.subset.holdout),
            "subset.shots and subset.holdout select among all records of a class, and views= would store those of each "
            "generation alone; leave them out, as a student selects its own",
        )
        return replace(replace(self, store=store).plan(first.options, views), first=first)


def warn_of_kept_names(folders: Sequence[str], option: str, name: str | None) -> None:
    """Warn that an option names passes which the store has under another name.

    Args:
        folders: Names of the folders of the passes.
        option: The option.
        name: Its value, None if it names nothing.
    """
    if name is not None and escape_key(name) not in {each.rpartition("-")[0] for each in folders}:
        logger.warning(
            "a pass keeps its name: this one exists as %s, so %s=%s is not used",
            ", ".join(folders),
            option,
            name,
        )


def request_passes(config: PrecomputeConfig, store: Store) -> PassRequest:
    """Resolve the teacher and the explainer of passes.

    Args:
        config: Options of the command.
        store: Store whose records are annotated, of which these are the passes over the first generation.

    Raises:
        ConfigError: If teacher or explainer do not fit the store.
    """
    teacher = config.teacher
    assert not isinstance(teacher, NoModelConfig)
    known = store.manifest.classes_of(teacher.classes or len(Network(teacher, ()).own_classes))
    store = store.part(0, 1)
    # Those that the store had when as many were known as the teacher has outputs, at first by default.
    classes = max(store.manifest.classes, known, key=len)
    network = Network(teacher, classes)
    if config.annotate.reads_head:
        network.require_outputs()
    return PassRequest(
        config=config,
        store=store,
        teacher=teacher,
        network=network,
        classes=classes,
        explainer=resolve_explainer(config.explainer, store, network.num_classes, len(classes)),
        described=network.describe(reads_head=config.annotate.reads_head),
        added=describe_network(config.annotate.outputs, teacher, classes),
    )


def plan_pass(config: PrecomputeConfig, store: Store, views: StoredViews | None = None) -> PassPlan:
    """Plan the pass that the options describe.

    With precision=auto it is the pass of float32 or of bfloat16 that the store has, and that of float32 if it has
    neither; with logits_dtype=auto likewise that of float16 or float32.

    Args:
        config: Options of the command.
        store: Store whose records are annotated.
        views: Stored views, None for the canonical view of every record.

    Raises:
        ConfigError: If teacher or explainer do not fit the store.
    """
    request = request_passes(config, store)
    return request.plan(request.existing_options() or next(_alternatives(config.annotate)), views)


def _alternatives(options: PassOptions) -> Iterator[PassOptions]:
    """Iterate over the options that `auto` may mean, the preferred ones first."""
    asked = options.logits_dtype
    dtypes: tuple[LogitsDtype, ...] = ("float16", "float32") if asked == "auto" else (asked,)
    precisions = _AUTOMATIC if options.precision == "auto" else (options.precision,)
    yield from (
        replace(options, precision=precision, logits_dtype=dtype)
        for dtype in dtypes
        for precision in precisions
    )


def _has_shards(folder: RootedPath) -> bool:
    """Return whether a shard of the pass was finished in an earlier call, or a job array has begun it."""
    return (
        file_at(folder / MANIFEST_NAME).exists()
        or file_at(folder / BEGUN_NAME).is_file()
        or bool(file_at(folder / COMMITS_FOLDER).paths(f"*{MARKER_SUFFIX}"))
    )
