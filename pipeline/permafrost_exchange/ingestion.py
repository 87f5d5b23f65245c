"""A pass of targets that another tool has made: identity, join with the records, shards and publication.

The pass is like one that precompute has written, so all that reads passes reads it. Its fingerprint covers the bytes of
the targets' files, the options of their format and the store. The names of the targets and the join are written next to
the shards while the pass is made, and tasks read the part of their shard.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from permafrost.annotation.pass_identity import fingerprint_pass
from permafrost.annotation.pass_plan import warn_of_kept_names
from permafrost.annotation.stored_views import StoredViews, plan_stored_views
from permafrost.config.options import Role, is_left_out, options_of, resolve_implementation
from permafrost.config.version import __version__
from permafrost.core.batches import Rendering
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.core.progress import say_if_slow
from permafrost.core.tasks import Executor
from permafrost.storage.files import file_at
from permafrost.store.commit import needs_commit
from permafrost.store.commit_pass import missing_pass_shards
from permafrost.store.manifest import CANONICAL_VIEW, INGESTED, ROWS_DIGEST, Passport
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry
from permafrost_exchange.encoding import EncodedTargets, encode_targets
from permafrost_exchange.format_options import TargetFormatConfig
from permafrost_exchange.ingest_shards import (
    IngestShard,
    WrittenPass,
    folder_of_pass,
    prepared,
    shards_of,
    store_targets,
    with_fields,
)
from permafrost_exchange.joining import JoinedTargets, join_targets
from permafrost_exchange.options import IngestConfig
from permafrost_exchange.recognition import require_arrays
from permafrost_exchange.target_reader import (
    ReadRequest,
    TargetError,
    TargetForm,
    TargetReader,
    reading,
)
from permafrost_exchange.turned_photographs import in_stored_pixels, turn_upright

logger = logging.getLogger("permafrost.ingest")

_SHOWN = 3
_SOFTER = 1.25
"""Ratio of the photographs' side to that of the frame above which views of crops lack detail."""


# ---- targets -------------------------------------------------------------------------------------


class IngestedTargets(NamedTuple):
    """Targets in the format of another tool, decided by the options."""

    config: TargetFormatConfig
    """Options of the format, with its frame."""
    reader: TargetReader
    form: TargetForm
    views: StoredViews | None
    """Views that targets are computed of, None for what the format stores."""

    @property
    def path(self) -> Path:
        """Path of the targets."""
        return self.reader.path

    @property
    def rendering(self) -> Rendering:
        """Rules by which views show images. Other tools move the nearest pixels."""
        if self.views is None:
            return Rendering(interpolation="nearest")
        return Rendering.of(self.views.describe()[0])

    def encode(self, request: ReadRequest) -> EncodedTargets:
        """Read the stored form of the targets of a request."""
        with reading(str(self.path)):
            if self.reader.turns_photographs is False:
                arrays = self.reader.read(in_stored_pixels(request))
                arrays = turn_upright(arrays, request.orientations)
            else:
                arrays = self.reader.read(request)
        return encode_targets(arrays, request.names, self.form, self.config, str(self.path))


def open_targets(config: IngestConfig, store: Store) -> IngestedTargets:
    """Open the targets of the options.

    Raises:
        ConfigError: If the options do not fit the format.
        TargetError: If the files are not what the format says.
    """
    require(
        store.form.has_places,
        f"store.path={store.path} has rows of a table, and targets of other tools are of images",
    )
    if (options := config.format).kind == "npz":
        require_arrays(config.path)
    reader = resolve_implementation(type(options))(options, Path(config.path).absolute())
    errors: list[UserError] = []
    form: Any = None
    for check in (*(checks := reader.checks()), reader.form):
        try:
            with reading(config.path):
                form = check()
        except UserError as error:
            errors.append(error)
    if (frame := options.frame or (None if errors else form.frame)) is None and (
        checks or not errors
    ):
        text = (
            f"format.frame is not set, and files of format={options.kind} do not say which part of each image the "
            "teacher received; set it to full, or to center_crop with format.crop_fraction=, or to unknown"
        )
        errors.append(ConfigError(text))
    if errors:
        _refuse(errors, reader)
    assert frame is not None
    if form.has_classes_of_data:
        form = replace(form, classes=len(store.manifest.classes))
    require(
        form.operations is None or frame == "full",
        f"format.frame={frame}: the views of format={options.kind} are views of whole images; leave it out",
    )
    for remark in form.remarks:
        logger.info("format=%s: %s", options.kind, remark)
    return IngestedTargets(
        replace(options, frame=frame), reader, form, _views(config, store, reader)
    )


def _refuse(errors: list[UserError], reader: TargetReader) -> NoReturn:
    """Raise one error with all that is wrong with targets, after what their files have."""
    with reading(str(reader.path)):
        described = reader.describe()
    if len(texts := list(dict.fromkeys(map(str, errors)))) == 1:
        raise type(errors[0])(described + texts[0])
    numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(texts, 1))
    raise TargetError(f"{described}{len(texts)} things are missing or wrong: {numbered}")


def _views(config: IngestConfig, store: Store, reader: TargetReader) -> StoredViews | None:
    """Plan the views that targets are computed of."""
    if config.views.kind == "canonical":
        return None
    require(
        reader.crops_targets,
        f"views={config.views.kind}: files of format={config.format.kind} have targets of certain views, and say "
        "nothing of others; leave views= out",
    )
    augment = config.augment
    kinds = [operation.kind for operation in augment.operations if operation.is_drawn]
    odd = [kind for kind in kinds if kind not in ("pad_crop", "resized_crop", "horizontal_flip")]
    require(
        augment.edges == "window",
        "augment.edges=image: targets of other tools are of windows; leave it out",
    )
    require(
        not odd,
        f"augment has {', '.join(odd)}, which targets of format={config.format.kind} cannot follow: they follow crops "
        "and horizontal flips; choose augment=resized_crop_flip",
    )
    return plan_stored_views(store, config.views, augment, config.split, config.subset, 1)


# ---- identity of the files -----------------------------------------------------------------------


def digest_files(reader: TargetReader) -> tuple[str, str]:
    """Return the digest of all files of targets by name and bytes, and that of the first file alone.

    They are read, as sizes and times prove nothing.
    """
    with say_if_slow(logger, f"reading {reader.path} for its digest ..."):
        pairs = [(_name_of(path, reader), reader.sha256_of(path)) for path in reader.files()]
    text = "".join(f"{name}\n{digest}\n" for name, digest in pairs)
    return hashlib.sha256(text.encode()).hexdigest(), pairs[0][1]


def _name_of(path: Path, reader: TargetReader) -> str:
    folder = reader.path if reader.path.is_dir() else reader.path.parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


# ---- pass ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestedPass(WrittenPass):
    """A finished pass of another tool's targets."""

    without_record: int
    """Number of targets that are of no record."""


_Check = Callable[
    [IngestShard, IngestedTargets, Sequence[ShardEntry], dict[str, Any]],
    tuple[Passport, dict[str, str]],
]
"""Comparison with a teacher: the passport, and entries of the manifest's `made_with`."""


def ingest_targets(
    config: IngestConfig,
    store: Store,
    executor: Executor,
    check: _Check | None = None,
) -> IngestedPass:
    """Write a pass of targets that exist, or finish one.

    Args:
        config: Options of the command.
        store: Store of the records.
        executor: Executor of the work.
        check: Compares targets with a teacher before they are stored, None for no comparison.

    Raises:
        ConfigError: If the options do not fit the files or the store.
        TargetError: If the files are not what their format says, or do not fit the records.
    """
    targets = open_targets(config, store)
    digest, file_digest = digest_files(targets.reader)
    with say_if_slow(logger, "joining the names of targets with the records ..."):
        kind = config.format.join or type(config.format).joins[0]
        with reading(config.path):
            joined = join_targets(
                store,
                targets.reader.listing(),
                kind,
                config.format.split,
                repeats=targets.form.repeats,
            )
        joined = _covered(joined, targets, store, config, kind)
    _say_if_turned(targets, store, joined)
    _say_if_softer(targets, store, joined)
    description = _describe_pass(config, store, targets, digest, joined)
    fingerprint = fingerprint_pass(description)
    folder = folder_of_pass(store, config.name or config.format.kind, fingerprint)
    warn_of_kept_names([folder.name], "name", config.name)
    shards = shards_of(store, joined)
    missing = missing_pass_shards(folder, shards)
    records = int((joined.numbers >= 0).sum())
    if not missing and not needs_commit(folder):
        logger.info("pass %s is complete", folder.name)
        return IngestedPass(
            name=folder.name,
            records=records,
            written=0,
            without_record=joined.without_record,
        )
    with prepared(folder, joined):
        task = IngestShard(
            store_path=store.folder,
            folder=folder,
            targets=targets,
            explainer=description["explainer"],
        )
        first = task.read(shards[0], task.rows_of(shards[0])[:1])
        description = _complete(description, targets, first)
        classes = description["teacher"]["classes"]
        if classes and not store.manifest.classes_of(classes):
            logger.warning(
                "the targets are of %d classes, and the data of %d, so labels apply to no student of these targets",
                classes,
                len(store.manifest.classes),
            )
        task = with_fields(
            task,
            config.store.backend,
            store,
            shards,
            first,
            fingerprint,
            is_selection=description["selection"] is not None,
        )
        compared = None if check is None else check(task, targets, shards, description)
    passport, made_with = (None, {}) if compared is None else compared
    written = store_targets(
        task,
        store,
        executor,
        shards,
        missing,
        description,
        {
            "permafrost": __version__,
            "targets": Path(config.path).name,
            "targets_sha256": file_digest if targets.path.is_file() else digest,
            **made_with,
        },
        passport=passport,
    )
    return IngestedPass(
        name=folder.name,
        records=records,
        written=written,
        without_record=joined.without_record,
    )


def _covered(
    joined: JoinedTargets,
    targets: IngestedTargets,
    store: Store,
    config: IngestConfig,
    kind: str,
) -> JoinedTargets:
    """Return the join for the records of the pass, once it is sure that none of their split is missing."""
    if targets.views is not None:  # views of a selection
        chosen = np.zeros(len(joined.numbers), bool)
        chosen[np.asarray(targets.views.rows)] = True
        joined = joined._replace(numbers=np.where(chosen, joined.numbers, -1))
        expected = chosen
    else:
        expected = expected_records(store, joined)
    require_covered(
        store,
        joined,
        expected,
        config.missing,
        f"by format.join={kind}",
        "Correct format.join= or path=",
    )
    if kind == "position":
        logger.warning(
            "targets and records are joined by their order, which nothing proves but teacher=, the network that made "
            "them"
        )
    return joined


def expected_records(store: Store, joined: JoinedTargets) -> NDArray[np.bool_]:
    """Return which records should have targets: those of splits with any target."""
    expected = np.zeros(len(joined.numbers), bool)
    for numbers in store.shards.splits.values():
        rows = np.concatenate([np.asarray(store.rows_of_shard(int(number))) for number in numbers])
        expected[rows] = bool((joined.numbers[rows] >= 0).any())
    return expected


def require_covered(
    store: Store,
    joined: JoinedTargets,
    expected: NDArray[np.bool_],
    missing: str | None,
    how: str,
    advice: str,
) -> None:
    """Check that records have targets, or list those that have none.

    Args:
        store: Store of the records.
        joined: Targets of its records.
        expected: True for records that should have one, [records].
        missing: File to which the keys of records without targets are written, None to stop at them.
        how: Rule of the join, for messages.
        advice: Fix, for messages.

    Raises:
        TargetError: If there are records without targets, and no file to list them.
    """
    lacking = np.flatnonzero(expected & (joined.numbers < 0))
    if len(lacking):
        if missing is None:
            raise TargetError(
                f"{len(lacking):,} of {int(expected.sum()):,} records have no target, {how}: "
                f"{', '.join(store.index.keys(lacking[:_SHOWN]))}; {joined.without_record:,} of {len(joined.names):,} "
                f"targets are of no record. {advice}, or set missing=missing.txt to list these records there and go on "
                "without them"
            )
        text = "".join(f"{key}\n" for key in store.index.keys(lacking))
        file_at(Path(missing)).write(text.encode())
        logger.warning(
            "%d records without targets are listed in %s; students can read the others only",
            len(lacking),
            missing,
        )
    if joined.without_record:
        logger.warning(
            "%d of %d targets are of no record, and left out",
            joined.without_record,
            len(joined.names),
        )


def selection_of(joined: JoinedTargets) -> dict[str, Any] | None:
    """Describe which records have targets, None for all."""
    if (joined.numbers >= 0).all():
        return None
    covered = np.flatnonzero(joined.numbers >= 0)
    rows = hashlib.sha256(covered.astype("<i8").tobytes()).hexdigest()
    return {"records": len(covered), ROWS_DIGEST: rows}


def _describe_pass(
    config: IngestConfig,
    store: Store,
    targets: IngestedTargets,
    digest: str,
    joined: JoinedTargets,
) -> dict[str, Any]:
    """Describe what the fingerprint covers, except what follows from it and the files."""
    options, frame = targets.config, targets.config.frame
    described = {
        option.name: getattr(options, option.name)
        for option in options_of(type(options))
        if Role.FILE not in option.roles and not is_left_out(option, getattr(options, option.name))
    }  # files that are named are part of the digest
    kind = described.pop("kind")
    views: dict[str, Any] = {"count": 1, "sampler": CANONICAL_VIEW, "seed": 0}
    selection = selection_of(joined)
    if targets.views is not None:
        views, selection = targets.views.describe()
    elif targets.form.operations is not None:
        views = {"count": 0, "sampler": kind, "seed": 0, "operations": [*targets.form.operations]}
        views |= {"edges": "window", **asdict(targets.rendering)}
        views["pixels"] = "originals" if store.has_larger_images else "frames"
    return {
        "dataset_fingerprint": store.manifest.dataset.fingerprint,
        "store_fingerprint": store.manifest.fingerprint,
        "selection": selection,
        "teacher": {
            "architecture": {"kind": INGESTED, "name": kind},
            "format": described,
            "weights_sha256": digest,
            "preprocessing": {},
            "frame": frame,
            "dtype": "float32",
        },
        "views": views,
        "explainer": targets.form.explainer or {},
        "backend": config.store.backend,
    }


def _say_if_turned(targets: IngestedTargets, store: Store, joined: JoinedTargets) -> None:
    """Log how many of the records EXIF turns, and what that means for targets of this format."""
    covered = joined.numbers >= 0
    count = int((store.index.values("orientation", range(len(covered)))[covered] != 1).sum())
    if not count or targets.reader.turns_photographs:
        return
    kind, total = targets.config.kind, int(covered.sum())
    if targets.reader.turns_photographs is None:
        text = (
            "nothing in format=%s says whether its teacher received them upright; maps of them lie wrong, and outputs "
            "are of a turned image, if it did not"
        )
    elif targets.form.operations is not None or targets.views is not None:
        text = "the teachers of format=%s received them as they are stored, and so do students in these views"
    else:
        text = (
            "the teachers of format=%s received them as they are stored; maps are turned with the images, and outputs "
            "are those of the turned image"
        )
    logger.warning("%d of %d records are photographs that EXIF turns: " + text, count, total, kind)


def _say_if_softer(targets: IngestedTargets, store: Store, joined: JoinedTargets) -> None:
    """Log that views of crops are sampled from frames with fewer pixels than the photographs."""
    if (targets.form.operations is None and targets.views is None) or store.has_larger_images:
        return
    sizes = store.index.take(("height", "width"), np.flatnonzero(joined.numbers >= 0))
    side, frame = int(np.median(np.minimum(*sizes.values()))), max(store.size)
    if side > _SOFTER * frame:
        logger.warning(
            "views are sampled from frames of %d pixels, and the shorter side of the photographs is %d (median), so "
            "small crops are softer than those that the teacher saw; pack the data with store.image_size=%d",
            frame,
            side,
            min(side, 2 * frame),
        )


def _complete(
    description: dict[str, Any], targets: IngestedTargets, first: EncodedTargets
) -> dict[str, Any]:
    """Return the description with what the first record shows: classes and views."""
    sizes = {spec.name: spec.shape for spec in first.fields}
    classes = targets.form.classes or next(iter(sizes.get("logits", (0,))))
    temperatures = {"temperatures": targets.form.temperatures} if "top_logits" in sizes else {}
    return {
        **description,
        **temperatures,
        "teacher": description["teacher"] | {"classes": classes},
        "views": description["views"] | {"count": next(iter(first.values.values())).shape[1]},
    }
