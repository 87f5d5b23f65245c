"""Passport of targets that were made elsewhere: the teacher that they are said to be of, run on a sample of the views.

What is stored and what the teacher says are compared: the class of the largest logit, the divergence
KL(teacher || stored) in nats, and the cosine of each map, feature and embedding to the teacher's, of what is left when
the mean over the records is taken away. If they differ, the cause is looked for among mistakes that others have made
(diagnosis.py, other_inputs.py). A cause that explains the difference stops with its remedy, unless the options accept
its kind; a difference that nothing explains is a warning, or stops where the targets hardly resemble the teacher's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from permafrost.annotation.precision import describe_agreement
from permafrost.annotation.samples import measure_sample, select_sample
from permafrost.config.cluster import ClusterConfig
from permafrost.config.explainers import EXPLAINERS
from permafrost.config.models import ModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.batches import Rendering
from permafrost.core.errors import require
from permafrost.core.records import TOP_LOGITS, VIEW_FIELDS, FieldSpec
from permafrost.core.tasks import Executor
from permafrost.models.network import Network
from permafrost.models.providers import with_preprocessing
from permafrost.models.resolve import resolve_network
from permafrost.models.trained_weights import DataClasses
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.manifest import Agreement, PassManifest, Passport, write_manifest
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import ShardEntry
from permafrost_exchange.diagnosis import CLOSE_NATS, Cause
from permafrost_exchange.ingest_shards import IngestShard
from permafrost_exchange.ingestion import IngestedTargets
from permafrost_exchange.map_forms import OTHER
from permafrost_exchange.options import IngestConfig, PassportOptions
from permafrost_exchange.target_comparison import (
    ComparePassport,
    TargetFacts,
    closest,
    distance_of,
)
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.passport")

_WRONG = 0.5
"""Agreement below which targets without an explanation are refused."""
_DOUBTFUL = 0.9
"""Agreement below which a difference without an explanation is a warning."""
_DOUBTFUL_NATS = 0.1
"""Divergence above which it is."""
_LAST = {"explainer": 1, "maps": 2}
"""Kinds of causes that are told after all others, as other outputs of the teacher explain other maps."""
_MAPS, TEACHER_WEIGHTS = "maps", "teacher_weights"
"""Entries of a manifest's `made_with`."""
_SAME_MAPS = 0.99
"""Mean cosine of maps below which a difference without an explanation is a warning."""
_HALF = 0.5
"""Fraction of the distance below which another reading of the same files is named."""


def check_ingested(
    config: IngestConfig,
    executor: Executor,
    task: IngestShard,
    targets: IngestedTargets,
    shards: Sequence[ShardEntry],
    description: dict[str, Any],
) -> tuple[Passport, dict[str, str]]:
    """Compare targets with the teacher of the options before they are stored.

    Args:
        config: Options of the command.
        executor: Executor of the work.
        task: Task that reads the targets.
        targets: The targets.
        shards: Shards of the pass.
        description: Entries of the pass's manifest.

    Returns:
        The passport, and entries of the manifest's `made_with`.

    Raises:
        TargetError: If another meaning of the targets fits much better than that of the options.
    """
    assert task.fields is not None
    assert isinstance(config.teacher, ModelConfig)
    facts = _facts_of(
        task.fields.fields,
        description["teacher"],
        description["views"],
        description["explainer"],
        description.get("temperatures", ()),
    )
    compare = partial(
        _compare,
        task.store,
        config.teacher,
        facts,
        shards=shards,
        options=config.passport,
        cluster=config.cluster,
        executor=executor,
    )
    passport, causes, maps = compare(source=task)
    distance = distance_of(passport.agreement)
    for option, reader in targets.reader.alternatives().items() if distance > CLOSE_NATS else ():
        other = replace(task, targets=targets._replace(reader=reader))
        if (left := distance_of(compare(source=other)[0].agreement)) < _HALF * distance:
            text = f"they are closer with {option}"
            causes = [Cause("preprocessing", text, f"set {option}", left)]
    passport = _judged(passport, causes, maps, config.passport, facts, config.path)
    return passport, _made_with(config.teacher, maps)


def check_pass(
    store: Store,
    teacher_pass: TeacherPass,
    teacher: ModelConfig,
    options: PassportOptions,
    cluster: ClusterConfig,
    executor: Executor,
) -> PassManifest:
    """Compare a pass with a teacher, and write the passport into its manifest.

    Returns:
        The manifest as it is now.

    Raises:
        TargetError: If another meaning of its targets fits much better, or they are of another network.
    """
    manifest = teacher_pass.manifest
    require(
        not manifest.views.get("mix"),
        f"store.teacher={teacher_pass.name}: its views are mixtures of two records, which a passport does not show to "
        "the teacher; name another pass",
    )
    facts = _facts_of(
        manifest.fields,
        manifest.teacher,
        manifest.views,
        manifest.explainer,
        manifest.temperatures,
    )
    covered = [shard for shard in store.shards if teacher_pass.shards.number_of(shard.name) >= 0]
    passport, causes, maps = _compare(
        store, teacher, facts, teacher_pass.folder, covered, options, cluster, executor
    )
    where = f"pass {teacher_pass.name}, whose manifest is as it was"
    passport = _judged(passport, causes, maps, options, facts, where)
    made_with = manifest.made_with | _made_with(teacher, maps)
    changed = replace(manifest, passport=passport, made_with=made_with)
    write_manifest(teacher_pass.folder, changed)
    return changed


def describe_passport(manifest: PassManifest) -> str:
    """Describe the agreement of a pass with its teacher, and that of its maps; empty without a passport."""
    if (passport := manifest.passport) is None:
        return ""
    parts = [describe_agreement(passport.agreement), manifest.made_with.get(_MAPS, "")]
    return f"{passport.teacher}: {'; '.join(filter(None, parts))}"


def _made_with(teacher: ModelConfig, maps: str) -> dict[str, str]:
    """Return entries of a manifest about the comparison: the maps, and the weights that were named."""
    file = Path(str(teacher.weights))
    weights = f"{file.name}, sha256 {file_at(file).sha256()}" if file.is_file() else "not a file"
    return {_MAPS: maps, TEACHER_WEIGHTS: weights}


def _facts_of(
    fields: tuple[FieldSpec, ...],
    teacher: dict[str, Any],
    views: dict[str, Any],
    explainer: dict[str, Any],
    temperatures: tuple[float, ...],
) -> TargetFacts:
    """Return what entries of a manifest say of targets."""
    has_views = any(spec.name in VIEW_FIELDS for spec in fields)
    crops = [spec.crop_fraction for spec in fields if spec.crop_fraction is not None]
    crops.append(teacher.get("format", {}).get("crop_fraction"))
    return TargetFacts(
        fields=fields,
        classes=int(teacher["classes"]),
        frame=str(teacher.get("frame")),
        crop_fraction=crops[0] if teacher.get("frame") == "center_crop" else None,
        explainer=explainer,
        temperatures=temperatures,
        operations=tuple(views.get("operations", ())) if has_views else None,
        rendering=Rendering.of(views),
        cuts_originals=views.get("pixels") == "originals",
    )


def _judged(
    passport: Passport,
    causes: Sequence[Cause],
    maps: str,
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
    nearest = "".join(f"; {cause.text}" for cause in causes if cause.kind == "unknown")
    causes = [cause for cause in causes if cause.kind != "unknown"]
    for cause in sorted(causes, key=lambda cause: _LAST.get(cause.kind, 0)):
        require(cause.kind != "explainer", f"{where}: {cause.text}; {cause.advice}", TargetError)
        unit = "of a cosine" if agreement.kl_mean is None or cause.kind == "maps" else "nats"
        if cause.kind not in options.accept:
            raise TargetError(
                f"{where}: the targets differ from those of teacher={passport.teacher}: {cause.text}; {cause.left:.2g} "
                f"{unit} are left {stated}. "
                f"{cause.advice[0].upper()}{cause.advice[1:]}, or set 'passport.accept=[{cause.kind}]' to take them as "
                "they are"
            )
        logger.warning("teacher=%s: %s", passport.teacher, cause.text)
    accepted: dict[str, str] = {cause.kind: cause.text for cause in causes}
    rest = (  # without what these causes explain
        replace(agreement, top1=None, kl_mean=None)
        if accepted.keys() & {"temperature", "classes", "rows", "preprocessing"}
        else agreement
    )
    if accepted.keys() & {"maps", "rows", "preprocessing"}:
        rest = replace(rest, cosine_mean={})
    if facts.frame != "unknown" and not _resembles(rest, _WRONG, float("inf")):
        require(
            "unknown" in options.accept,
            f"{where}: the targets are not those of teacher={passport.teacher} {stated}, and no other meaning of "
            f"them explains it{nearest}; name the network that made them, or set 'passport.accept=[unknown]' to "
            "take them as they are",
            TargetError,
        )
        accepted["unknown"] = "they differ, and the cause is unknown"
    key = agreement.kl_largest_key
    has_odd_maps = facts.frame != "unknown" and rest.cosine_mean.get("map", 1.0) < _SAME_MAPS
    is_doubtful = has_odd_maps or not _resembles(rest, _DOUBTFUL, _DOUBTFUL_NATS)
    differs = is_doubtful or distance_of(rest) > closest(rest)
    logger.log(
        logging.WARNING if is_doubtful else logging.INFO,
        "teacher=%s: %s%s%s%s",
        passport.teacher,
        describe_agreement(agreement),
        f"; {maps}" if maps else "",
        "" if key is None else f"; worst {key}",
        f"; they differ, cause unknown{nearest}" if differs else "",
    )
    return replace(passport, accepted=accepted)


def _compare(
    store: Store,
    teacher: ModelConfig,
    facts: TargetFacts,
    source: IngestShard | RootedPath,
    shards: Sequence[ShardEntry],
    options: PassportOptions,
    cluster: ClusterConfig,
    executor: Executor,
) -> tuple[Passport, list[Cause], str]:
    """Run the teacher on a sample, compare, and look for the causes of differences.

    Returns:
        The passport, the causes, and the agreement of the maps as text (empty without maps).
    """
    config = resolve_network(teacher, store, "teacher")
    outputs = facts.classes or len(store.manifest.classes)
    names = store.manifest.classes_of(outputs)
    classes: DataClasses = names or outputs
    stored = _outputs(facts.fields)
    # The provider's input size and interpolation, and the part of the image that the targets say.
    config = with_preprocessing(config, outputs)
    described = Network(config, classes).describe(reads_head="logits" in stored)
    require(
        not facts.classes or described["classes"] == facts.classes,
        f"teacher.classes: the targets are of {facts.classes} classes, and teacher={config.name} has "
        f"{described['classes']}; name the network that made the targets",
    )
    explained = {name: value for name, value in facts.explainer.items() if name != "seed"}
    kind, unexplained = explained.pop("kind", "gradcam"), ""
    if kind == OTHER or kind not in EXPLAINERS:
        unexplained = f"explainer={kind}" + ", whose plug-in is not named" * (kind != OTHER)
        kind, explained = "gradcam", {}
        stored = tuple(name for name in stored if name != "maps")
    explainer = EXPLAINERS[kind](**explained)
    sizes = {spec.name: spec.shape for spec in facts.fields}
    if sizes.get("map", (0,))[0] == 1:  # the teacher explains the stored class
        explainer = replace(explainer, target_classes="sample_gt", max_classes=None)
    task = ComparePassport(
        store_path=store.folder,
        teacher=config,
        classes=classes,
        explainer=explainer,
        config=PassOptions(
            outputs=stored,
            class_map_size=sizes.get("class_maps", (0, 0, 2))[-1],
            features_mirror=False,
            features_dtype="float16",
        ),
        num_threads=cluster.threads_per_actor,
        facts=facts,
        source=source,
        most_views=options.views,
        class_names=names,
        unexplained=unexplained,
    )
    count = sum(shard.records for shard in shards)
    sample = (
        [(shard, shard.records) for shard in shards]
        if options.records is None or options.records >= count
        else list(select_sample(shards, options.records))
    )
    agreement, causes, maps = measure_sample(executor, task, sample, ())
    passport = Passport(
        teacher=f"{config.kind} {config.name}, {config.interpolation or 'bilinear'}, "
        f"{config.input_size or max(store.size)} pixels",
        weights_sha256=described["weights_sha256"],
        agreement=agreement,
    )
    return passport, causes, maps


def _outputs(fields: Sequence[FieldSpec]) -> tuple[str, ...]:
    """Return the outputs whose fields a pass has, and the logits that maps explain."""
    names = {spec.name for spec in fields}
    kinds = {
        "logits": {"logits", TOP_LOGITS, "map", "class_maps"},
        "maps": {"map"},
        "class_maps": {"class_maps"},
        "pooled": {"pooled"},
        "attention": {name for name in names if name.startswith("attention_")},
        "features": {name for name in names if name.startswith("features_")},
    }
    return tuple(kind for kind, having in kinds.items() if names & having)


def _resembles(agreement: Agreement, lowest: float, nats: float) -> bool:
    """Return whether the largest logit and the cosines agree at least so far, and the divergence is at most this."""
    top1 = 1.0 if agreement.top1 is None else agreement.top1
    worst = min([top1, *agreement.cosine_mean.values()])
    return worst >= lowest and (agreement.kl_mean or 0.0) <= nats
