"""The inputs of an evaluation: the evaluated network, its records, its passes, and the runs that it is compared with.

The network is built when it is first needed, so a repeated command whose results exist does not load torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.models import ModelConfig, NoModelConfig, Picture
from permafrost.config.plugins import plugin_digests
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, UserError, require
from permafrost.evaluation.results import (
    MAPS,
    NETWORK_EVALUATION,
    PICTURE,
    TEACHER_EVALUATION,
    TEACHER_PICTURE,
    evaluation_folder,
    place_beside,
)
from permafrost.loading.subset import HOLDOUT, rows_of_split
from permafrost.models.resolve import resolve_network
from permafrost.models.saved import SavedNetwork, TrainedModel, recorded_picture
from permafrost.runs.folder import PassRecords, RunFolder, pass_inputs, saved_options
from permafrost.runs.trackers import check_logger
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store, TeacherPass, logits_first

if TYPE_CHECKING:
    from permafrost.evaluation.forward import EvaluatedModel


logger = logging.getLogger("permafrost.evaluate")


def without_unknown_variants(config: EvaluateConfig, typed: Sequence[str]) -> EvaluateConfig:
    """Return the config without the baselines of an experiment that are variants of its sweep, and not runs.

    A single student is not compared with a variant, which has one student for each seed. A baseline that was typed
    stays, so that its absence is an error.

    Args:
        config: Options of the command.
        typed: Arguments of the command line.
    """
    if any(".baseline=" in argument for argument in typed):
        return config
    variants = {
        name
        for name in config.baselines
        if not SavedNetwork(RunFolder(name).path / "distill").is_finished
    }
    for variant in sorted(variants):
        logger.info(
            "the comparison with baseline=%s is left out, as there is no run of that name (a variant is known in its "
            "sweep only); name a run with evaluate.<evaluator>.baseline=",
            variant,
        )
    return config.with_baselines(dict.fromkeys(variants))


# ---- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """Inputs of an evaluation: the network, which is not built yet, its store and its teacher passes."""

    config: EvaluateConfig
    main: str
    """Folder of the first evaluation of this network in its run on this store."""
    is_elsewhere: bool = False
    """True if the store is not the one that the network was trained on, as far as that is known."""
    store: Store
    passes: list[TeacherPass]
    fingerprint: str
    trained: TrainedModel
    """Facts of the network, with its picture in this evaluation."""
    build: Callable[[], tuple[EvaluatedModel, TrainedModel]]
    others: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of other networks that the results depend on, by name, besides those of the passes."""

    @property
    def run_folder(self) -> RunFolder:
        """The run."""
        return RunFolder(self.config.run)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of all inputs, by name."""
        return {
            self.config.model: self.fingerprint,
            "store": self.store.manifest.fingerprint,
            **({} if self.trained.picture is None else {PICTURE: str(self.trained.picture)}),
            **self.others,
            **pass_inputs(self.passes),
        }

    @property
    def pictures(self) -> dict[str, str]:
        """Pictures that the network receives, and that the teacher received for the pass that it is compared with.

        Where their explainers differ, both are named.
        """
        if self.trained.picture is None:
            return {}
        pictures = {PICTURE: str(self.trained.picture)}
        if self.passes:
            teacher = self.passes[0].manifest.teacher
            picture = Picture.from_manifest(teacher, self.store.size)
            pictures[TEACHER_PICTURE] = str(picture or teacher.get("frame", ""))
            if (own := self.trained.explainer) and self.passes[0].explainer not in (None, own):
                theirs = f"{self.passes[0].explainer} ({self.passes[0].name})"
                pictures[MAPS] = f"map_cosine compares {own} of the student with {theirs}"
        return pictures


def open_inputs(config: EvaluateConfig) -> EvaluationInputs:
    """Resolve the options of an evaluation, and open what it reads.

    Raises:
        ConfigError: If a network, a pass or the package of `logger` is missing.
        StoreMismatchError: If a pass does not fit the network.
    """
    check_logger(config.logger)
    store = Store(config.store.at(config.evaluate.store))
    config = replace(config, evaluate=config.evaluate.on(store.manifest.records))
    for split in set(config.evaluate.splits) - {HOLDOUT}:
        rows_of_split(store.index, split)  # which names the splits that exist
    if config.model == "network":
        return open_network(config)
    if config.model == "teacher":  # a teacher is not compared with another student
        return open_teacher(config.with_baselines(dict.fromkeys(config.baselines)))
    return open_student(config)


def open_student(config: EvaluateConfig) -> EvaluationInputs:
    """Open the student of the run and the passes that it is compared with, by default those it was trained on.

    Raises:
        ConfigError: If the run has no finished student, or evaluate.against names no pass.
        DamagedFileError: If the student's files are not those that its training wrote.
        StoreMismatchError: If a pass of the student is missing in the store.
    """
    run = RunFolder(config.run).path
    student = run / "distill"
    trained = SavedNetwork(student).describe()
    require(
        HOLDOUT not in config.evaluate.splits
        or trained.subset.holdout > 0
        or config.evaluate.store is not None,
        f"evaluate.splits={HOLDOUT}: the student was trained with subset.holdout=0, which holds out no records; name "
        "another split, or train with subset.holdout=10",
    )
    place = place_beside(student, Store(config.store.folder))
    main = evaluation_folder(config.evaluate.against, place)
    store, passes = _open_compared(config, trained, student, run / main, is_elsewhere=bool(place))
    store = _known_store(config, store, trained.classes, f"the network in {student}")
    if trained.picture is not None:
        store.warn_of_other_picture(trained.picture)
    shown = trained.in_frame(config.evaluate.frame, store)
    _announce_passes(student, store, passes, is_elsewhere=bool(place))
    elsewhere = place or place_beside(run / main, store)
    return EvaluationInputs(
        config=config,
        main=evaluation_folder(config.evaluate.against, elsewhere),
        is_elsewhere=bool(elsewhere if config.evaluate.store is not None else place),
        store=store,
        passes=passes,
        fingerprint=SavedNetwork(student).check(),
        trained=shown,
        build=partial(_build_student, config, student, store, passes, shown),
        others=plugin_digests(trained.config),
    )


def _known_store(
    config: EvaluateConfig, store: Store, classes: Sequence[str], network: str
) -> Store:
    """Return the store as a network of its first classes knows it, with a warning of records of others."""
    known = store.known_to(classes)
    for split in set(config.evaluate.splits) - {HOLDOUT}:
        known.warn_of_later_classes(
            network,
            rows_of_split(known.index, split),
            f"its accuracy on {split} is that on the other records",
        )
    return known


def _open_compared(
    config: EvaluateConfig,
    trained: TrainedModel,
    student: Path,
    folder: Path,
    *,
    is_elsewhere: bool,
) -> tuple[Store, list[TeacherPass]]:
    """Open the store that a student is evaluated on, and the passes that it is compared with, the first with logits.

    Args:
        config: Options of the command.
        trained: The student.
        student: Folder of its training.
        folder: Folder of its first evaluation.
        is_elsewhere: True if it was trained on another store than store.path.
    """
    if config.evaluate.against is not None:
        store, passes = open_against(config, config.evaluate.against, PassRecords([folder]))
        return store, logits_first(passes)
    names = config.store.teacher or trained.teachers
    if is_elsewhere and not config.store.teacher:
        names = _passes_elsewhere(config, Store(config.store.folder), names, student)
    records = PassRecords([folder] if is_elsewhere else [student, folder])
    store, passes = open_evaluation_store(config, names, records)
    if not names:
        passes = [teacher for teacher in passes if teacher.num_classes == trained.num_classes]
    return store, logits_first(passes)


def _announce_passes(
    student: Path, store: Store, passes: Sequence[TeacherPass], *, is_elsewhere: bool
) -> None:
    """Log which of several passes a student is compared with, or that it is compared with none of those there are."""
    if len(passes) > 1:
        logger.info(
            "%s has %d teachers; agreement and maps are compared with %s",
            student,
            len(passes),
            passes[0].name,
        )
    known = [folder.name for folder in store.pass_folders()]
    if known and not passes and not is_elsewhere:
        logger.warning(
            "%s was trained without a pass of %s, so its agreement with a teacher is not measured; to measure it, "
            "choose a pass with store.teacher: %s",
            student,
            store.path,
            ", ".join(known),
        )


def _build_student(
    config: EvaluateConfig,
    student: Path,
    store: Store,
    passes: Sequence[TeacherPass],
    facts: TrainedModel,
) -> tuple[EvaluatedModel, TrainedModel]:
    """Build the student of a folder, which receives images as `facts` says."""
    from permafrost.evaluation.forward import EvaluatedModel
    from permafrost.models.compute import resolve_device

    resolve_network(facts.config, store, "student")
    model, described = SavedNetwork(student).load(store.manifest.classes)
    described = replace(described, picture=facts.picture)
    compares = passes and passes[0].manifest.has_logits
    if compares and passes[0].num_classes != described.num_classes:
        raise StoreMismatchError(
            f"{student} has {described.num_classes} classes, {passes[0].folder} has {passes[0].num_classes}; "
            "set store.teacher, or evaluate.against, to a pass of the same classes"
        )
    device = resolve_device("evaluate.device", config.evaluate.device)
    return EvaluatedModel(network=model.to(device), input_size=described.input_size), described


def _passes_elsewhere(
    config: EvaluateConfig, store: Store, names: Sequence[str], student: Path
) -> tuple[str, ...]:
    """Return the passes of another store by the teachers of a student, as far as the store of its training says."""
    saved = saved_options(student)
    try:
        training = Store(config.store.at(saved["store"]["path"]))
        training = training.part_with(saved["inputs"]["store"])
        passes = training.open_passes(names) if names else []
        present = tuple(store.canonical_of(teacher).name for teacher in passes)
    except UserError:  # it is elsewhere, or the other store has no pass of the same teacher
        present = ()
    logger.info(
        "%s is not the store that %s was trained on%s",
        store.path,
        student,
        ""
        if present
        else "; no pass of the student's teacher was found in it, so the student is not compared with one "
        "(permafrost precompute makes it, and store.teacher= names it)",
    )
    return present


def open_evaluation_store(
    config: EvaluateConfig, names: Sequence[str], records: PassRecords
) -> tuple[Store, list[TeacherPass]]:
    """Open the store that students are evaluated on, and its teacher passes.

    With evaluate.store, the passes are those of the same teachers in that store.

    Args:
        config: Options of the command.
        names: The passes in store.path that the student was trained on, of stored views, too. If it is empty (a student
            trained on labels), the pass is used that the run was compared with before, otherwise the only pass of the
            store, if it has one.
        records: Passes that the run has read, to which it keeps.

    Raises:
        StoreMismatchError: If a name fits no pass or several.
    """
    training_store = records.part_of(Store(config.store.folder))
    names = [_canonical_name(training_store, name) for name in names]
    fingerprint = training_store.manifest.fingerprint
    passes = training_store.resolve_passes(names, records.in_store(fingerprint))
    if config.evaluate.store is None:
        return training_store, passes
    store = open_record_store(config)
    return store, [store.canonical_of(teacher) for teacher in passes]


def _canonical_name(store: Store, name: str) -> str:
    """Return the name of the canonical pass of the same teacher if `name` names only a pass of stored views."""
    if store.passes_named(name) or len(store.passes_named(name, stored_views=True)) != 1:
        return name
    return store.canonical_of(store.open_pass(name, stored_views=True)).name


def open_record_store(config: EvaluateConfig) -> Store:
    """Open the store with the records to evaluate: evaluate.store or, if it is null, store.path.

    Raises:
        ConfigError: If the held-out records of one store would be selected in the other, or for another network than
            the student.
    """
    other = config.evaluate.store
    require(
        config.model == "student" or HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} selects the records that a student's training left out; name a split of the store "
        f"for model={config.model}",
    )
    require(
        other is None or HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} selects records of the store that the student was trained on, but "
        f"evaluate.store={other} is a different store; name a split of that store",
    )
    return Store(config.store.at(other))


def open_against(
    config: EvaluateConfig, name: str, records: PassRecords
) -> tuple[Store, list[TeacherPass]]:
    """Open the store that students are evaluated on, and the pass of evaluate.against in it.

    Args:
        config: Options of the command.
        name: Value of evaluate.against.
        records: As for `open_evaluation_store`.

    Raises:
        ConfigError: If the name is not that of one pass.
    """
    store = open_record_store(config)
    try:
        return store, store.resolve_passes((name,), records.in_store(store.manifest.fingerprint))
    except StoreMismatchError:
        known = ", ".join(folder.name for folder in store.pass_folders()) or "none"
        raise ConfigError(
            f"evaluate.against={name} is not one pass of {store.path}, which has: {known}; name one of them (null: the "
            "student's own pass)"
        ) from None


def open_teacher(config: EvaluateConfig) -> EvaluationInputs:
    """Open the network of `teacher`, with its own pass if the store has one.

    Raises:
        ConfigError: If `teacher` or its weights are not named, or a split is that of held-out records.
        StoreMismatchError: If the network did not make the passes that are named.
    """
    from permafrost.evaluation.other_networks import passes_of_teacher
    from permafrost.models.network import Network

    teacher, store = _open_given(config, "teacher", "the network of the teacher")
    described = Network(teacher, store.manifest.classes).describe(reads_head=config.reads_outputs)
    named = store.open_passes(config.store.teacher) if config.store.teacher else []
    run = RunFolder(config.run).path
    main = TEACHER_EVALUATION + place_beside(run / TEACHER_EVALUATION, store)
    passes = passes_of_teacher(run / main, teacher, store, named)
    picture = Picture.from_manifest(passes[0].manifest.teacher if passes else described, store.size)
    num_classes = described["classes"]
    if (
        not config.reads_outputs
    ):  # its features may predict the labels of other classes than its own
        num_classes = len(store.manifest.classes)
        passes = [
            teacher_pass
            for teacher_pass in passes
            if teacher_pass.num_classes == num_classes or not teacher_pass.manifest.has_logits
        ]
    return EvaluationInputs(
        config=config,
        main=main,
        store=store,
        passes=passes,
        fingerprint=sha256_json(described),
        trained=(trained := _described(config, teacher, store, num_classes, picture)),
        build=partial(_build_given, config, trained, store),
    )


def open_network(config: EvaluateConfig) -> EvaluationInputs:
    """Open the given network of `student`, with the pass of `teacher`, or the only pass, if the store has one.

    A pair of given networks needs no pass. Its classes may be others than those of the store if the evaluators only
    read features.

    Raises:
        ConfigError: If `student` or its weights are not named, a split is that of held-out records, or an evaluator
            reads outputs for other classes.
        StoreMismatchError: If `teacher` did not make the pass that is named.
    """
    from permafrost.models.network import Network
    from permafrost.models.network_sheet import normalization_facts

    student, store = _open_given(config, "student", "the network to evaluate")
    run = RunFolder(config.run).path
    main = NETWORK_EVALUATION + place_beside(run / NETWORK_EVALUATION, store)
    num_classes = len(store.manifest.classes)
    network = Network(student, store.manifest.classes, "student")
    described = network.describe()
    for fact in normalization_facts(network, config.command):
        logger.info("%s: %s%s", fact.name, fact.text(), f". {fact.warning}" * bool(fact.warning))
    of_features = [name for name in EVALUATORS if not EVALUATORS[name].reads_outputs]
    reading = [name for name in config.requested_evaluators if name not in of_features]
    require(
        described["classes"] == num_classes or not reading,
        f"student.classes={described['classes']} are not the {num_classes} classes of {store.path}, and "
        f"evaluators=[{','.join(reading)}] reads the network's classes; name evaluators of features, as in "
        f"evaluators=[{','.join(of_features)}]",
    )
    passes, of_teacher = _passes_of_pair(config, store, run / main)
    passes = [teacher_pass for teacher_pass in passes if teacher_pass.num_classes == num_classes]
    alone = of_teacher is not None and not passes
    return EvaluationInputs(
        config=config,
        main=main,
        store=store,
        passes=passes,
        fingerprint=sha256_json(described),
        trained=(
            trained := _described(config, student, store, num_classes, recorded_picture(student))
        ),
        build=partial(_build_given, config, trained, store),
        others={"teacher network": sha256_json(of_teacher)} if alone else {},
    )


def _open_given(
    config: EvaluateConfig, section: Literal["teacher", "student"], needed: str
) -> tuple[ModelConfig, Store]:
    """Return the options of the network that is evaluated, and the records of the classes that it knows.

    Args:
        config: Options of the command.
        section: Section of the network.
        needed: The network in a message on its absence.

    Raises:
        ConfigError: If the network or its weights are not named.
    """
    from permafrost.models.network import Network

    network = config.teacher if section == "teacher" else config.student
    if isinstance(network, NoModelConfig) or network.weights is None:
        raise ConfigError(
            f"model={config.model} needs {needed}; name it with {section}= and {section}.weights="
        )
    store = open_record_store(config)
    network = resolve_network(network, store, section)
    trained = Network(network, (), section).own_classes
    return network, _known_store(config, store, trained, f"the {config.model} in {network.weights}")


def _passes_of_pair(
    config: EvaluateConfig, store: Store, folder: Path
) -> tuple[list[TeacherPass], dict[str, Any] | None]:
    """Return the passes that a given network is compared with, and the description of its given teacher, if any.

    Args:
        config: Options of the command.
        store: Store of the records.
        folder: Folder of the first evaluation of the network.

    Raises:
        StoreMismatchError: If the teacher did not make the pass that is named.
    """
    from permafrost.evaluation.other_networks import check_made_pass, first_made_pass
    from permafrost.models.network import Network

    teacher = config.teacher
    if isinstance(teacher, NoModelConfig) or teacher.weights is None:
        recorded = PassRecords([folder]).in_store(store.manifest.fingerprint)
        return store.resolve_passes(config.store.teacher, recorded), None
    named = store.open_passes(config.store.teacher) if config.store.teacher else []
    passes = named or [store.open_pass(folder.name) for folder in store.pass_folders()]
    described = Network(teacher, store.manifest.classes).describe()
    teacher_passes = first_made_pass(folder, store, described["weights_sha256"], passes)
    check_made_pass(teacher, store, teacher_passes or named)
    return teacher_passes, described


def _described(
    config: EvaluateConfig,
    network: ModelConfig,
    store: Store,
    num_classes: int,
    picture: Picture | None = None,
) -> TrainedModel:
    """Describe a given network as the one of a training is described; without a picture, in the usual one."""
    from permafrost.models.network import Network

    side = Network(network, store.manifest.classes).input_size
    size = store.size if side is None else (side, side)
    return TrainedModel(
        config=network, num_classes=num_classes, input_size=size, picture=picture
    ).in_frame(config.evaluate.frame, store)


def _build_given(
    config: EvaluateConfig, trained: TrainedModel, store: Store
) -> tuple[EvaluatedModel, TrainedModel]:
    """Build a given network."""
    from permafrost.evaluation.other_networks import build_teacher

    device = config.evaluate.device
    return build_teacher(trained.config, store, device, reads_head=config.reads_outputs), trained
