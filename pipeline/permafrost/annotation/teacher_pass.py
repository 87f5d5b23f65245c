"""A teacher pass, from what is settled on a sample to the annotation of missing shards and its publication."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.feature_projections import FitProjections, fit_projections
from permafrost.annotation.moved_features import (
    MOVED_RECORDS,
    MeasureMovedFeatures,
    describe_moved_features,
)
from permafrost.annotation.pass_changes import begin_pass
from permafrost.annotation.pass_plan import (
    BEGUN_NAME,
    PassPlan,
    PassRequest,
    plan_pass,
    request_passes,
    warn_of_kept_names,
)
from permafrost.annotation.precision import (
    PRECISION_RECORDS,
    ComparePrecision,
    PrecisionError,
    describe_agreement,
    describe_shortfall,
)
from permafrost.annotation.samples import SampleTask, measure_sample, select_sample
from permafrost.annotation.shard_tasks import AnnotateShard, Correct, count_correct
from permafrost.annotation.stored_views import requested_views
from permafrost.annotation.teacher_check import CheckTeacher, check_teacher
from permafrost.config.cluster import WorkConfig
from permafrost.config.models import FoldsModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig
from permafrost.config.version import __version__
from permafrost.core.errors import require
from permafrost.core.progress import say_if_slow
from permafrost.core.records import FEATURES, TOP_CLASS
from permafrost.core.tasks import Executor, ShardResult, run_shards
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.loading.target_sheet import target_sheet
from permafrost.models.compute import unused_accelerator
from permafrost.models.cost import count_parameters, sha256_tensors
from permafrost.models.explanations import pass_precision
from permafrost.models.fold_networks import digests_of_keys
from permafrost.models.network_sheet import machine_sheet, network_facts, trained_on
from permafrost.models.providers import with_recorded_layer
from permafrost.runs.folder import RunFolder, save_cost
from permafrost.storage.files import file_at, remove_partial_files
from permafrost.storage.lock import folder_lock
from permafrost.storage.rooted_paths import name_of_path
from permafrost.storage.untrusted import load_tensors
from permafrost.store.commit import needs_commit, remove_shared_leftovers
from permafrost.store.commit_pass import commit_pass, missing_pass_shards
from permafrost.store.entries import ManifestError
from permafrost.store.facts import FactSheet, announce, read_sheets, write_sheets
from permafrost.store.fields import PassFields
from permafrost.store.manifest import (
    MANIFEST_NAME,
    TEACHERS_FOLDER,
    Agreement,
    MovedFeatures,
    describe_excess,
    read_pass_manifest,
)
from permafrost.store.projections import (
    describe_projections,
    read_projections,
    write_projection,
)
from permafrost.store.reader import BACKENDS, Store

_SampleTask = TypeVar("_SampleTask", bound="SampleTask[Any]")


logger = logging.getLogger("permafrost.precompute")


_MAX_LOST = 0.02
"""Fraction of the variance that components may lose on appended records without a warning."""


class Annotation(NamedTuple):
    """Work of a call of `annotate_passes`."""

    forward_passes: int
    """Number of records, each counted once for each of its views."""
    canonical: str
    """Name of the canonical pass."""
    passes: dict[str, float]
    """Bytes per record of all passes of this call, by their names."""
    accuracy: dict[str, float]
    """Top-1 accuracy of the teacher by split, in [0, 1]; empty if this call computed nothing, if records have several
    labels or none, and if the teacher's classes are not those of the store."""
    sheets: dict[str, FactSheet]
    """Facts about the teacher, the targets of the pass that students train on, and the machine, by subject."""


def _pass_sheets(
    teacher: FactSheet,
    plan: PassPlan,
    accuracy: Mapping[str, float],
    store: Store,
    executor: Executor,
) -> dict[str, FactSheet]:
    """Return the facts about a finished pass over all generations, which are measured and written once for each."""
    is_single = store.num_generations == 1
    if is_single and not accuracy and (sheets := read_sheets(plan.folder)):
        return sheets
    stored = store.open_pass(plan.folder.name, stored_views=plan.views is not None)
    with say_if_slow(logger, f"reading the targets of {plan.folder.name} for its facts ..."):
        targets = target_sheet(
            stored,
            accuracy=(accuracy or _accuracy(plan, {})) if is_single else None,
            trained_on=trained_on(plan.teacher, store),
        )
    machine = machine_sheet(
        plan.config.cluster.threads_per_actor or torch.get_num_threads(),
        stored.manifest.made_with.get("device", "unknown"),
        _decode_threads(plan.config.cluster, executor),
    )
    sheets = {sheet.subject: sheet for sheet in (teacher, targets, machine)}
    with executor.alone(plan.folder, "writes the facts"):  # no other task may remove the new file
        remove_partial_files(plan.folder)  # of a call that was killed while it wrote them
        write_sheets(plan.folder, sheets)
    return sheets


def annotate_passes(config: PrecomputeConfig, store: Store, executor: Executor) -> Annotation:
    """Finish and commit the canonical pass and, if `views=` requests one, the pass of stored views.

    Args:
        config: Options of precompute, with what `resolve_precompute` derives from the store.
        store: Finished store.
        executor: Runs the shards.

    Raises:
        ConfigError: If teacher, explainer or views do not fit the store.
        TeacherError: If the teacher's outputs contradict the options.
        PrecisionError: If a sample in the precision of the options is too far from float32.
    """
    request = request_passes(config, store)
    with executor.alone(store.folder / TEACHERS_FOLDER, "begins a pass"):
        plans, teacher = _begin_passes(request, store, executor)
    results = [annotate_pass(plan, executor) for plan in plans]
    # 4. Those over what was appended, with all that the first ones have measured.
    for number in range(1, store.num_generations):
        part = store.part(number, number + 1)
        results += [_annotate_further(request.following(plan, part), executor) for plan in plans]
    with executor.alone(store.folder / TEACHERS_FOLDER, "reads the targets"):
        sheets = [
            _pass_sheets(teacher, plan, accuracy, store, executor)
            for plan, (_, accuracy) in zip(plans, results, strict=False)
        ]
    return Annotation(
        sheets=sheets[-1],
        forward_passes=sum(annotated for annotated, _ in results),
        canonical=plans[0].folder.name,
        passes={plan.folder.name: plan.bytes_per_record() for plan in plans},
        accuracy=results[0][1],
    )


def _begin_passes(
    request: PassRequest, store: Store, executor: Executor
) -> tuple[list[PassPlan], FactSheet]:
    """Return the passes over the first generation, with what `auto` means, measured on a sample before a new pass."""
    # 1. What is asked for, and what of it exists.
    config, first = request.config, store.part(0, 1)
    if config.annotate.reads_head:
        known = store.manifest.classes_of(request.network.num_classes)
        store.known_to(known).warn_of_later_classes(
            f"the teacher {request.teacher.name}",
            range(store.index.num_rows),
            "its logits and maps of them are of its own classes, and no student is trained on them; train a teacher on "
            "all classes with permafrost teach (teaching.start= keeps what this one knows)",
        )
    request.warn_of_aliasing()
    if isinstance(request.teacher, FoldsModelConfig):
        _say_of_folds(request, request.teacher.records, store)
    options = begun = request.existing_options()
    described = tuple(network_facts(request.network, config.command, store.size))
    teacher = FactSheet(subject="teacher", facts=described)
    if options is None:
        announce([teacher])
    # 2. What `auto` means, measured on a sample before a new pass.
    agreement = None
    if options is None:
        options = _choose_logits(request, executor)
        options, agreement = _choose_precision(request, options, executor)
    elif config.annotate.precision == "auto":
        logger.info("annotate.precision=auto: %s, as in the pass that was begun", options.precision)
    # 3. The passes.
    plans = [request.plan(options)]
    if config.views.kind != "canonical":
        plans.append(request.plan(options, requested_views(config, first)))
    warn_of_kept_names([plan.folder.name for plan in plans], "annotate.name", config.annotate.name)
    # The task of a job array that commits measures it.
    if begun and executor.name != "array" and any(plan.is_unfinished for plan in plans):
        _, agreement = _choose_precision(request, begun, executor)
    for plan in plans:
        mark = file_at(plan.folder / BEGUN_NAME)
        if executor.name == "array" and plan.is_unfinished and not mark.is_file():
            mark.write(b"")
    return [replace(plan, agreement=agreement) for plan in plans], teacher


def _say_of_folds(request: PassRequest, records: int, store: Store) -> None:
    """Say which outputs differ between folds, and warn if some of their records have other keys in the store."""
    if channels := {FEATURES, "pooled"}.intersection(request.config.annotate.outputs):
        logger.info(
            "%s of different folds are of different networks and not comparable: compare records of the same fold, a "
            "field of the pass",
            " and ".join(sorted(channels)),
        )
    assert request.network.file is not None
    digests = load_tensors(request.network.file.path)["digests"].numpy()
    shared = sum(
        int(np.isin(digests_of_keys(store.index.shard_keys(number)), digests).sum())
        for number in range(len(store.shards))
    )
    if shared < records:
        logger.warning(
            "the folds are of %d records, and %s has %d of them by their keys: an image under another key is annotated "
            "by any network, perhaps by one that has seen it; use the store that the folds were trained on",
            *(records, store.path, shared),
        )


def _annotate_further(plan: PassPlan, executor: Executor) -> tuple[int, dict[str, float]]:
    """Write the pass over a further generation that follows a pass over the first one, as `annotate_pass` does.

    What the first one has measured is kept, and measured again to say if it fits.
    """
    if (first := plan.first) is None or not plan.is_unfinished:
        return 0, {}
    projections = read_projections(first.folder)
    for field, projection in projections.items():
        write_projection(plan.folder, field, projection)
    if projections:
        task = _sample_task(FitProjections, plan, plan.options, folder=plan.folder)
        kept = fit_projections(executor, task, plan.store.shards, plan.config.split)
        for field, projection in projections.items():
            if kept[field] < projection.kept_share - _MAX_LOST:
                logger.warning(
                    "%s: the components of %s keep %.1f%% of the variance of %s in appended records, and %.1f%% in the "
                    "first ones, on which they were fitted; a pass over a new store fits them anew",
                    plan.folder.name,
                    first.folder.name,
                    100 * kept[field],
                    field,
                    100 * projection.kept_share,
                )
    try:
        _, agreement = _choose_precision(plan, first.options, executor)
    except PrecisionError as error:
        logger.warning(
            "%s: the precision of %s is kept, but %s", plan.folder.name, first.folder.name, error
        )
        agreement = None
    return annotate_pass(replace(plan, agreement=agreement), executor)


def plan_passes(config: PrecomputeConfig, store: Store) -> list[list[PassPlan]]:
    """Plan the passes that the options ask for, without measuring what `auto` means.

    Each is a list: the pass over the first generation, and those that follow it over further ones.

    Args:
        config: Options of precompute, with what `resolve_precompute` derives from the store.
        store: Finished store.

    Raises:
        ConfigError: If teacher, explainer or views do not fit the store.
    """
    first, *others = [store.part(number, number + 1) for number in range(store.num_generations)]
    request, plans = request_passes(config, store), [plan_pass(config, store)]
    if config.views.kind != "canonical":
        plans.append(plan_pass(config, store, requested_views(config, first)))
    warn_of_kept_names([plan.folder.name for plan in plans], "annotate.name", config.annotate.name)
    return [[plan, *(request.following(plan, other) for other in others)] for plan in plans]


def _choose_logits(request: PassRequest, executor: Executor) -> PassOptions:
    """Look at the teacher before a new pass, and return the options with the dtype of its logits.

    Raises:
        TeacherError: If the outputs contradict the options.
    """
    options, reason = request.config.annotate, ""
    task = _sample_task(CheckTeacher, request, options)
    check = check_teacher(executor, task, request.store.shards)
    if check is not None and options.reads_head:
        check.require_sound(request.classes)
        reason = check.needs_float32()
    dtype = options.logits_dtype
    if reason and dtype == "auto":
        logger.info("annotate.logits_dtype=auto: float32, because %s", reason)
        dtype = "float32"
    elif reason and dtype == "float16":
        logger.warning("annotate.logits_dtype=float16: %s; float32 stores them as they are", reason)
    return replace(options, logits_dtype="float16" if dtype == "auto" else dtype)


def _choose_precision(
    request: PassRequest | PassPlan, options: PassOptions, executor: Executor
) -> tuple[PassOptions, Agreement | None]:
    """Return the options with the precision of a pass that is not finished, and its agreement with float32.

    The agreement is None if it was not measured.

    Args:
        request: What is asked for.
        options: Options of the pass; with precision=auto of a new one.

    Raises:
        PrecisionError: If the options name a precision in which a sample of the records is too far from float32.
    """
    asked = options.precision
    float32 = replace(options, precision="float32")
    lower = replace(options, precision="bfloat16")
    if asked == "float32" or pass_precision(lower, request.explainer) == "float32":
        return float32 if asked == "auto" else options, None
    task = _sample_task(ComparePrecision, request, options)
    sample = select_sample(request.store.shards, PRECISION_RECORDS)
    precision, agreement = measure_sample(executor, task, sample, request.store.shards)
    measured = replace(options, precision=precision)
    if agreement is None:
        return measured, None
    if not (shortfall := describe_shortfall(agreement)):
        logger.info(
            "annotate.precision=%s against float32: %s", precision, describe_agreement(agreement)
        )
        return measured, agreement
    if asked == "auto":
        logger.info("annotate.precision=auto: float32, because with %s %s", precision, shortfall)
        return float32, None
    raise PrecisionError(
        f"annotate.precision={asked}: in a sample of {agreement.records} records {shortfall}; set "
        "annotate.precision=float32"
    )


def _sample_task(
    kind: type[_SampleTask],
    subject: PassRequest | PassPlan,
    options: PassOptions,
    **attributes: Any,
) -> _SampleTask:
    """Build a task that measures a sample of the pass's records."""
    return kind(
        store_path=subject.store.folder,
        teacher=subject.teacher,
        classes=subject.classes,
        explainer=subject.explainer,
        config=options,
        num_threads=subject.config.cluster.threads_per_actor,
        **attributes,
    )


def annotate_pass(plan: PassPlan, executor: Executor) -> tuple[int, dict[str, float]]:
    """Write the missing shards of a pass, and commit it.

    Args:
        plan: Plan of the pass.
        executor: Executor that runs the tasks.

    Returns:
        The number of forward passes of this call, and the teacher's accuracy by split; without any work, and for
        records that it cannot be computed on, (0, {}).
    """
    is_array = executor.name == "array"
    with folder_lock(plan.folder, "annotate.name", is_shared=is_array):
        if is_array and not needs_commit(plan.folder):  # since it was planned
            plan = replace(plan, missing=missing_pass_shards(plan.folder, plan.shards))
        if not plan.is_unfinished:
            agreement = read_pass_manifest(plan.folder).agreement
            logger.info(
                "pass %s is complete%s: weights, network files and options match",
                plan.folder.name,
                ""
                if agreement is None
                else f" ({plan.precision}: {describe_agreement(agreement)})",
            )
            with executor.alone(plan.folder, "ends"):
                remove_shared_leftovers(plan.folder, executor)
            return 0, {}
        if not is_array:
            remove_partial_files(plan.folder)
        with executor.alone(plan.folder, "begins the pass"):
            _fit_projections(plan, executor)
            if not is_array or needs_commit(plan.folder):
                begin_pass(plan)
        # The driver builds the network once for the names and shapes of its fields, and leaves GPUs to the actors.
        annotator = TeacherAnnotator(
            plan.teacher,
            plan.classes,
            plan.explainer,
            replace(plan.options, compile=False, precision="float32"),
            plan.store.size,
            torch.device("cpu"),
        ).with_projections(read_projections(plan.folder))
        fields = _fields_of(plan, annotator)
        shared_files = fields.create()
        if (kind := unused_accelerator()) is not None:
            logger.warning(
                "passes run on CUDA devices and on CPUs, so %s of this machine is not used", kind
            )
        # Other processes need not measure its layout again.
        teacher = (
            plan.teacher
            if executor.name == "serial"
            else with_recorded_layer(plan.teacher, _made_with(plan, annotator))
        )
        tensors = sha256_tensors(annotator.model.network)
        if equal := [
            f"{made.name} ({made.manifest.made_with['weights']})"
            for made in plan.store.usable_passes()
            if made.manifest.made_with.get("tensors_sha256") == tensors
            and made.manifest.teacher["weights_sha256"]
            != plan.description["teacher"]["weights_sha256"]
        ]:
            logger.warning(
                "the weights are equal, tensor for tensor, to those of %s, but are another file, so this is another "
                "pass",
                ", ".join(equal),
            )
        task = AnnotateShard(
            store_path=plan.store.folder,
            store_fingerprint=plan.store.manifest.fingerprint,
            folder=plan.folder,
            fields=fields,
            fingerprint=plan.fingerprint,
            teacher=teacher,
            classes=plan.classes,
            explainer=plan.explainer,
            config=plan.options,
            num_threads=plan.config.cluster.threads_per_actor,
            decode_threads=_decode_threads(plan.config.cluster, executor),
            views=plan.views,
        )
        counts: dict[str, Correct] = {}

        def count(result: ShardResult[Correct]) -> None:
            counts[result.name] = result.report

        annotated, seconds = run_shards(
            "teacher",
            executor,
            task,
            plan.missing,
            count,
            sum(shard.records for shard in plan.missing),
        )
        with executor.alone(plan.folder, "writes the manifest of the pass"):
            if plan.config.run:
                save_cost(RunFolder(plan.config.run).path / "precompute", seconds, annotated)
            is_first = not is_array or needs_commit(plan.folder)
            if is_first:
                agreement = plan.agreement
                if is_array and agreement is None:
                    agreement = _choose_precision(plan, plan.options, executor)[1]
                commit_pass(
                    plan.folder,
                    plan.shards,
                    plan.description | {"follows": plan.first and plan.first.fingerprint},
                    plan.fingerprint,
                    fields.fields,
                    shared_files,
                    _made_with(plan, annotator) | {"tensors_sha256": tensors},
                    plan.added,
                    agreement,
                    _measure_moved_features(plan, executor),
                )
            remove_shared_leftovers(plan.folder, executor)
    return annotated * plan.num_views, _accuracy(plan, counts) if is_first else {}


def _decode_threads(cluster: WorkConfig, executor: Executor) -> int:
    """Return the number of threads that decode for a teacher: the option, or the cores that it has."""
    if cluster.decode_threads is None and executor.name == "ray":
        return max(1, int(cluster.cpus_per_actor))
    return resolve_decode_threads(cluster.decode_threads)


def _fields_of(plan: PassPlan, annotator: TeacherAnnotator) -> PassFields:
    """Return the backend of the fields of a pass that is about to be written, and log what they are.

    Raises:
        ConfigError: If a value is too large.
    """
    if plan.precision != plan.options.precision:
        logger.info(
            "annotate.precision=%s: maps of explainer=%s are gradients through the whole network in %s, so the logits "
            "are taken from that pass too",
            plan.options.precision,
            plan.explainer.kind,
            plan.precision,
        )
    specs = [*annotator.fields(), *(plan.views.fields() if plan.views is not None else ())]
    logger.info(
        "teacher %s: %s of %d shards, %s already done, into pass %s",
        plan.teacher.name,
        ", ".join(spec.name for spec in specs),
        len(plan.shards),
        len(plan.shards) - len(plan.missing),
        plan.folder.name,
    )
    excess = describe_excess(specs, plan.num_views)
    require(
        excess is None,
        f"a pass cannot have values of this size: {excess}; store fewer views, or smaller maps or features",
    )
    return BACKENDS[plan.config.store.backend](
        plan.folder, tuple(specs), len(plan.shards), plan.rows_per_chunk, plan.num_views
    )


def _fit_projections(plan: PassPlan, executor: Executor) -> None:
    """Write the projections of the features, if the options ask for any that do not exist.

    Raises ManifestError if they are not those of a committed pass.
    """
    if "projection" not in plan.description:
        return
    committed = file_at(plan.folder / MANIFEST_NAME).exists()
    listed = read_pass_manifest(plan.folder).projections if committed else {}
    # All of them are written before the first shard.
    has_started = committed or len(plan.missing) < len(plan.shards)
    mark = plan.folder / BEGUN_NAME  # of the task of a job array that has fitted them
    is_fitted = file_at(mark).is_file() and file_at(mark).read() != b""
    if (has_started or is_fitted) and read_projections(plan.folder).keys() >= listed.keys():
        return
    task = _sample_task(FitProjections, plan, plan.options, folder=plan.folder)
    fit_projections(executor, task, plan.store.shards, plan.config.split)
    if executor.name == "array":
        file_at(mark).write(b"fitted")
    for field, entry in describe_projections(plan.folder).items():
        require(
            field not in listed or listed[field].file.sha256 == entry.file.sha256,
            f"{plan.folder / entry.file.path} is not the projection that the features were stored with, and a new fit "
            f"differs in its last bits; delete {plan.folder} and run permafrost precompute again",
            ManifestError,
        )
        logger.info(
            "%s: %d components of %d channels keep %.1f%% of their variance",
            field,
            plan.options.features_channels,
            entry.channels,
            100 * entry.kept,
        )


def _measure_moved_features(plan: PassPlan, executor: Executor) -> MovedFeatures | None:
    """Measure the error of warped features, None if the pass warps none."""
    if FEATURES not in plan.options.outputs or plan.views is not None:
        return None
    task = _sample_task(MeasureMovedFeatures, plan, plan.options, folder=plan.folder)
    sample = select_sample(plan.shards, MOVED_RECORDS)
    moved = measure_sample(executor, task, sample, plan.shards) if sample else None
    if moved is not None:
        logger.info(
            "warped with a view, features miss of the teacher's variance: %s",
            describe_moved_features(moved),
        )
    return moved


def _accuracy(plan: PassPlan, counts: Mapping[str, Correct]) -> dict[str, float]:
    """Compute the teacher's accuracy by split, or F1 for many labels; empty for stored views and classes of its own.

    Args:
        counts: Counts of the shards of this call, by name; those of an earlier call are counted here.
    """
    if (
        plan.views is not None
        or not (stored_pass := plan.store.part_of_pass(plan.folder)).manifest.has_logits
    ):
        return {}
    if (classes := len(plan.classes)) and stored_pass.num_classes != classes:
        logger.warning(
            "the teacher's accuracy is not measured, because the labels are of %d classes and its outputs of %d",
            classes,
            stored_pass.num_classes,
        )
        return {}
    sums: dict[str, Correct] = {}
    for shard in plan.shards:
        if (shard_counts := counts.get(shard.name)) is None:
            rows = np.arange(shard.records)
            name = TOP_CLASS if stored_pass.manifest.temperatures else "logits"
            values = stored_pass.open_shard(shard, (name,))[name][rows, np.zeros_like(rows)]
            shard_counts = count_correct(plan.store, shard, {name: values[:, None]}, bool(classes))
        before = sums.get(shard.split, Correct(0, 0))
        sums[shard.split] = Correct(*map(sum, zip(before, shard_counts, strict=True)))
    return {split: total.correct / total.labeled for split, total in sums.items() if total.labeled}


def _made_with(plan: PassPlan, annotator: TeacherAnnotator) -> dict[str, str]:
    """Versions, size and weights, without the folders of a file elsewhere, and the layer of a network of one's own."""
    layout = getattr(annotator.model, "layout", None)
    return {
        "permafrost": __version__,
        "torch": torch.__version__,
        "weights": name_of_path(str(plan.teacher.weights)),
        "parameters": f"{count_parameters(annotator.model.network):,}",
        **({"layer": str(annotator.model.layer), "layout": str(layout)} if layout else {}),
        **({"memory_format": "channels_last"} if annotator.settings.channels_last else {}),
        **({"compiler": "torch.compile"} if plan.options.compile else {}),
    }
