"""Passes that a student is trained on, and those that it is compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    RandomViewsConfig,
    describe_mix,
)
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import (
    METHODS,
    MethodConfig,
    MethodSetting,
    SeveralConfig,
    SoftTargetsConfig,
)
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.store import OUTPUTS
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import FEATURES, FOLD
from permafrost.loading.replayed_views import check_replayed
from permafrost.loading.subset import rows_of_split
from permafrost.models.network import Network
from permafrost.runs.folder import PassRecords
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store, TeacherPass, logits_first

if TYPE_CHECKING:
    from permafrost.losses.base import DistillationLoss, Needs


logger = logging.getLogger("permafrost.training")


def open_student_store(config: DistillConfig, records: PassRecords) -> Store:
    """Open the generations of a store that a student is trained on: those that it has read, or that its passes cover.

    Args:
        config: Options of the command.
        records: What the run has read before.

    Raises:
        StoreMismatchError: If a name fits no pass or several.
    """
    if (store := records.part_of(Store(config.store.folder))).num_generations == 1:
        return store
    passes = open_passes(with_named_passes(config, store, records), store)
    if config.subset.rule == "auto" and (config.subset.shots or config.subset.holdout):
        logger.info(
            "subset.rule=auto: by_key, as records were appended to %s, so that others displace few of those selected",
            store.path,
        )
    covered = min((each.num_generations for each in passes), default=store.num_generations)
    if covered < store.num_generations:
        logger.warning(
            "%s has %d generations, and %s cover the first %d, which the student is trained on; run permafrost "
            "precompute with the teacher for the others",
            store.path,
            store.num_generations,
            ", ".join(each.name for each in passes),
            covered,
        )
    store = store.part(0, covered)
    with_logits = (each.num_classes for each in passes if each.manifest.has_logits)
    known = store.manifest.classes_of(next(with_logits, 0))
    name = f"the teacher of {', '.join(each.name for each in passes)}"
    if (live := live_teacher(config)) is not None:
        known, name = Network(live, ()).own_classes, f"the live teacher {live.name}"
    store = store.known_to(known)
    store.warn_of_later_classes(
        name,
        rows_of_split(store.index, config.split),
        "the student learns the other classes, and is not trained on these records",
    )
    return store


def with_named_passes(config: DistillConfig, store: Store, records: PassRecords) -> DistillConfig:
    """Return the options with store.teacher set to the full names of the passes that a run reads.

    The terms of method=several name them in full, too.

    Without stored targets (labels, or a live teacher), these are the passes that the student is compared with. If the
    run has not read any and the store has several, store.teacher stays empty.

    Args:
        config: Options of the command.
        store: The store.
        records: Passes that the run has read before.

    Raises:
        StoreMismatchError: If a name fits no pass or several.
    """
    replays = config.mode == "replay"
    views = config.views.count if replays else None
    recorded = records.in_store(store.manifest.fingerprint, replays=replays)
    method = config.method
    if isinstance(method, SeveralConfig):
        full = {name: _full_name(name, store, recorded, views) for name in method.pass_names}
        terms = tuple(replace(term, teacher=full[term.teacher]) for term in method.terms)
        method = replace(method, terms=terms)
        names = method.pass_names
    else:
        passes = store.resolve_passes(config.store.teacher, recorded, stored_views=views)
        names = tuple(teacher.name for teacher in passes)
    return replace(config, method=method, store=replace(config.store, teacher=names))


def _full_name(
    name: str, store: Store, recorded: Sequence[tuple[str, ...]], stored_views: int | None
) -> str:
    """Return the full name of the pass of a term. Raises StoreMismatchError if it fits no pass or several."""
    try:
        return store.resolve_passes((name,), recorded, stored_views=stored_views)[0].name
    except StoreMismatchError as error:
        folders = store.pass_folders(stored_views=stored_views is not None)
        if name in {folder.name for folder in folders}:
            raise
        known = ", ".join(folder.name for folder in folders) or "none"
        raise StoreMismatchError(
            f"method.terms: teacher={name} is not one pass of {store.path}{store.hint_at_unfinished(name)}; choose "
            f"among: {known}"
        ) from error


def open_passes(config: DistillConfig, store: Store) -> list[TeacherPass]:
    """Open the passes to train on: none for methods without a teacher and for a live teacher.

    Raises:
        StoreMismatchError: If no pass is named and the store has several of stored views, or a name fits none.
    """
    if not config.method.needs_teacher or config.mode == "live":
        return []
    method = config.method
    names = method.pass_names if isinstance(method, SeveralConfig) else config.store.teacher
    if config.mode == "replay" and not names:
        _refuse_several_replayed(config, store)
    return store.open_passes(names, stored_views=config.mode == "replay")


def _refuse_several_replayed(config: DistillConfig, store: Store) -> None:
    """Raise StoreMismatchError if the store has several passes of stored views and none is named."""
    folders = store.pass_folders(stored_views=True)
    if len(folders) > 1:
        passes = [store.open_pass(folder.name, stored_views=True) for folder in folders]
        matching = sum(teacher.num_views == config.views.count for teacher in passes)
        available = ", ".join(f"{teacher.name} ({teacher.num_views} views)" for teacher in passes)
        raise StoreMismatchError(
            f"{store.path} contains {matching} passes with views.count={config.views.count} stored views; "
            f"choose one with views=random views.count= or store.teacher= from: {available}"
        )


def live_teacher(config: DistillConfig) -> ModelConfig | None:
    """Return the network that runs in every step with mode=live, or None."""
    return None if isinstance(config.teacher, NoModelConfig) else config.teacher


def check_passes(
    config: DistillConfig, passes: Sequence[TeacherPass], loss: DistillationLoss
) -> None:
    """Check that one student can be trained on all of the passes.

    Raises:
        StoreMismatchError: If a pass does not have what the method reads, or the passes differ in views, classes or
            explainer.
        ConfigError: If the student has other classes.
    """
    for teacher in passes:
        require(
            teacher.manifest.teacher.get("frame") != "unknown" or config.store.unknown_views,
            f"{teacher.name}: the part of each image that the teacher received is unknown; set "
            "store.unknown_views=true to use the targets as those of whole images",
            StoreMismatchError,
        )
        readers = _methods_of(config.method, teacher)
        for method, needs in zip(readers, loss.needs_of(teacher.name), strict=True):
            _check_contents(teacher, needs, method, config.method)
            _check_logits(method, teacher)
    _check_alike("views", passes)
    if config.mode == "replay":
        for teacher in passes:
            check_replayed(config.augment, teacher)
            _check_mixtures(config, teacher)
    with_logits = [teacher for teacher in passes if teacher.manifest.has_logits]
    _check_alike("num_classes", with_logits)
    for teacher in with_logits[:1]:
        require(
            config.student.classes in (None, teacher.num_classes),
            f"student.classes={config.student.classes}, but the logits of {teacher.name} are of {teacher.num_classes} "
            "classes; leave out student.classes",
        )
    if loss.needs.explainer is None:
        _check_alike("explainer", _with_maps(passes, loss))


def _check_mixtures(config: DistillConfig, teacher: TeacherPass) -> None:
    """Raise StoreMismatchError if a pass does not store the mixtures of views.mix, or its own do not fit the method."""
    stored = teacher.views.get("mix")
    if isinstance(config.views, RandomViewsConfig) and config.views.mixes:
        asked = describe_mix(config.views.mix)
        if asked != stored:
            stored_form = f"mixtures by {stored}" if stored else "no mixtures"
            raise StoreMismatchError(
                f"views.mix={asked}, but the stored views of {teacher.name} are {stored_form}; name a pass that "
                "permafrost precompute made with this option, or leave it out"
            )
    if not stored:
        return
    augment = replace(config.augment, mix=(MixConfig(kind="mixup"),))
    try:
        config.method.check(
            MethodSetting(
                mode=config.mode,
                views=config.views,
                augment=augment,
                trainer=config.trainer,
                student=config.student,
            )
        )
    except ConfigError as error:
        raise StoreMismatchError(
            f"the stored views of {teacher.name} are mixtures, as by augment.mix: {error}; or name a pass without "
            "views.mix"
        ) from error


def served_methods(teacher: TeacherPass) -> list[str]:
    """Return the methods of this project whose default options a pass can serve.

    Methods with their own views are left out, because they read stored views, too. Those of others may not be built
    without options, and a suggestion must not fail.
    """
    from permafrost.losses.base import build_loss  # imports torch

    served = []
    for kind, options in METHODS.items():
        is_own = options.implementation.startswith(("permafrost.", "permafrost_papers."))
        is_single = options.needs_teacher and not issubclass(options, SeveralConfig)
        if not (is_own and is_single) or options.live_views:
            continue
        method = options()
        if teacher.manifest.temperatures and method.all_logits_option:
            continue
        if all(
            _lack(teacher, needs) is None for needs in build_loss(method).needs_of(teacher.name)
        ):
            served.append(kind)
    return served


def _lack(teacher: TeacherPass, needs: Needs) -> str | None:
    """Return what a loss reads and a pass does not have: maps, logits, an output, or those of one network."""
    if needs.maps_in(0) and teacher.explainer is None:
        return "maps"
    if absent := [name for name in needs.outputs if not teacher.fields_of(name)]:
        return absent[0]
    if teacher.fields_of(FOLD) and {FEATURES, "pooled"} & set(needs.outputs):
        return FOLD
    return "logits" if needs.targets and needs.logits and not teacher.manifest.has_logits else None


def _check_contents(
    teacher: TeacherPass, needs: Needs, method: MethodConfig, student_method: MethodConfig
) -> None:
    """Raise StoreMismatchError unless a pass has what a method reads.

    Args:
        student_method: Method of the student, of which `method` may be a term.
    """
    if (lack := _lack(teacher, needs)) is None:
        return
    reader, option = f"method={method.kind}", "store.teacher="
    live = ", or run the teacher in the loop with mode=live"
    if student_method is not method:
        reader, option, live = f"a term method={method.kind}", "method.terms", ""
    served = served_methods(teacher)
    serves = f"; it can serve method={', '.join(served)}" if served else ""
    if lack == "maps":
        raise StoreMismatchError(
            f"{teacher.folder} holds no maps, but {reader} needs them{serves}; "
            "for maps run permafrost precompute with annotate.outputs=[logits,maps]"
        )
    if lack == FOLD:
        raise StoreMismatchError(
            f"{teacher.folder} is of the networks of several folds, whose channels mean different things, but {reader} "
            f"compares channels{serves}; name a pass of one network with {option}"
        )
    if lack == "logits":
        raise StoreMismatchError(
            f"{teacher.folder} holds no logits, but {reader} needs them{serves}; set method.lambda_kd=0, or run "
            f"permafrost precompute with logits in annotate.outputs and name its pass with {option}"
        )
    networks = " or ".join(OUTPUTS[lack].networks)  # whose maps may need another explainer
    stored = set() if networks else {name for name in OUTPUTS if teacher.fields_of(name)}
    outputs = ",".join(name for name in OUTPUTS if name in stored.union(needs.outputs, ["logits"]))
    raise StoreMismatchError(
        f"{teacher.folder} holds no output {lack}, {networks and f'which only {networks} teachers have, '}but {reader} "
        f"needs it{serves}; run permafrost precompute with {networks and f'teacher={networks} and '}"
        f"annotate.outputs=[{outputs}] and name its pass with {option}{live}"
    )


def _check_alike(what: str, passes: Sequence[TeacherPass]) -> None:
    """Raise StoreMismatchError if the teachers of one student differ in an attribute."""
    for teacher in passes:
        require(
            getattr(teacher, what) == getattr(passes[0], what),
            f"the teachers of one student differ in {what}: {passes[0].name} has "
            f"{getattr(passes[0], what)}, {teacher.name} has {getattr(teacher, what)}; choose other passes",
            StoreMismatchError,
        )


def _with_maps(passes: Sequence[TeacherPass], loss: DistillationLoss) -> list[TeacherPass]:
    """Return the passes whose maps the loss reads."""
    return [
        teacher
        for teacher in passes
        if any(needs.maps_every is not None for needs in loss.needs_of(teacher.name))
    ]


def explainer_of(passes: Sequence[TeacherPass], loss: DistillationLoss) -> str | None:
    """Return method.explainer, or the explainer of the maps that the loss reads, or that of the first pass."""
    of_passes = (teacher.explainer for teacher in [*_with_maps(passes, loss), *passes])
    return loss.needs.explainer or next(of_passes, None)


def _methods_of(method: MethodConfig, teacher: TeacherPass) -> list[MethodConfig]:
    """Return the methods that read a pass: the student's, or those of its terms."""
    if isinstance(method, SeveralConfig):
        return [term.method for term in method.terms if term.reads(teacher.name)]
    return [method]


# ---- moved features --------------------------------------------------------------------------------


def describe_moved_features_risk(
    config: DistillConfig, passes: Sequence[TeacherPass], loss: DistillationLoss
) -> str:
    """Say where frozen features of the student's views are worse than a constant, or were not measured.

    Without the teacher, what is known is the pass's measurement of shifts and flips (`moved_features`), and how strong
    the other operations are.

    Returns:
        The warnings in one line, "" if there are none.
    """
    if config.mode != "frozen":
        return ""
    warnings: list[str] = []
    for teacher in passes:
        readers = _methods_of(config.method, teacher)
        for method, needs in zip(readers, loss.needs_of(teacher.name), strict=True):
            fields = _moved_fields(teacher, method) if FEATURES in needs.outputs else {}
            if fields and needs.map_control != "unaugmented":
                warnings += _warnings_of_views(teacher, fields, config.augment)
    if not warnings:
        return ""
    return (
        f"{'; '.join(dict.fromkeys(warnings))}. Measure it with permafrost evaluate model=teacher "
        "evaluators=[equivariance]: at features_lost=1 a constant would be as close. To avoid it, replay stored views "
        "(precompute with views=random, mode=replay) or use a milder augmentation"
    )


def _moved_fields(teacher: TeacherPass, method: MethodConfig) -> dict[str, int]:
    """Return the fields of a pass that a method compares and views warp, with their number of cells."""
    names = teacher.fields_of(FEATURES)
    cells = {
        spec.name: spec.shape[-2] * spec.shape[-1]
        for spec in teacher.manifest.fields
        if spec.name in names and spec.when_moved == "warp_covered"
    }
    stored = list(cells)
    chosen = [
        stored[number] if -len(stored) <= number < 0 else f"{FEATURES}_{number}"
        for number in getattr(method, "teacher_stages", ()) or getattr(method, "stages", (-1,))
    ]
    return {name: cells[name] for name in chosen or stored if name in cells}


def _warnings_of_views(
    teacher: TeacherPass, fields: Mapping[str, int], augment: AugmentOptions
) -> Iterator[str]:
    """Iterate over warnings about fields, with their number of cells, in views of an augmentation."""
    drawn = {operation.kind: operation for operation in augment.operations if operation.is_drawn}
    measured = teacher.manifest.moved_features
    lost = {} if measured is None else measured.lost
    for name, (kind, view) in product(fields, _MEASURED.items()):
        share = lost.get(name, {}).get(view, 0.0)
        if kind in drawn and share > 1:
            yield (
                f"{name} of {teacher.name} misses {share:.2f} of the teacher's variance after a {view}, as precompute "
                "measured, which is more than a constant misses"
            )
    strong = [text for kind, text in _STRONG.items() if kind in drawn]
    crop = drawn.get("resized_crop")
    if isinstance(crop, OperationConfig):
        name, cells = min(fields.items(), key=lambda field: field[1])
        low, high = crop.crop_scale
        strong.insert(
            0,
            f"crops of {low:.0%} to {high:.0%} of the area (the smallest show {low * cells:.1f} of {cells} cells of "
            f"{name})",
        )
    if strong:
        yield (
            f"augment has {' and '.join(strong)}: {', '.join(fields)} of {teacher.name} are approximate in these "
            "views, and nothing says by how much"
        )


_MEASURED = {"pad_crop": "shift", "horizontal_flip": "flip"}
"""Operations whose view a pass measures under this name."""
_STRONG = {
    "vertical_flip": "vertical flips",
    "rotation": "rotations",
    "affine": "affine maps",
    "randaugment": "operations of randaugment",
    "trivialaugment": "operations of trivialaugment",
}
"""Operations that the measurement of a pass does not have, besides crops."""


# ---- logits ----------------------------------------------------------------------------------------


def _check_logits(method: MethodConfig, teacher: TeacherPass) -> None:
    """Raise StoreMismatchError unless a method can be trained on the logits that a pass stores."""
    if (known := teacher.manifest.temperatures) and method.all_logits_option:
        raise StoreMismatchError(
            f"{method.all_logits_option} needs the logits of all classes, but {teacher.folder} holds only the largest "
            "ones; choose method=kd with method.logits=softmax, or make a pass with annotate.logits=all"
        )
    if known and isinstance(method, SoftTargetsConfig) and method.tau not in known:
        raise StoreMismatchError(
            f"method.tau={method.tau:g}: {teacher.folder} holds the sum over all but the largest logits at the "
            f"temperatures {', '.join(f'{temperature:g}' for temperature in known)} only; choose one of "
            "them, or make a pass with annotate.temperatures"
        )


def compared_passes(
    config: DistillConfig, store: Store, passes: Sequence[TeacherPass], num_classes: int
) -> list[TeacherPass]:
    """Return the canonical passes that the student is compared with, as its evaluation does.

    A student without stored targets (labels, or a live teacher) is compared with the passes of store.teacher, or with
    the only one of the store.

    Args:
        config: Options of the student.
        store: Store of the passes.
        passes: Passes that the student is trained on.
        num_classes: Number of the student's classes; passes of other classes are left out.
    """
    if config.mode == "replay":
        return logits_first(store.compared_with(passes))
    if passes or not (config.store.teacher or len(store.pass_folders()) == 1):
        return logits_first(passes)
    candidates = store.open_passes(config.store.teacher)
    return [teacher for teacher in candidates if teacher.num_classes == num_classes]
