"""The inputs of an evaluation: the evaluated network, its records, its passes, and the runs that it is compared with.

The network is built when it is first needed, so a repeated command whose results exist does not load torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from permafrost.config.evaluation import EVALUATORS
from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.verbs import EvaluateConfig
from permafrost.core.digests import sha256_json
from permafrost.core.errors import ConfigError, require
from permafrost.evaluation.results import (
    NETWORK_EVALUATION,
    TEACHER_EVALUATION,
    evaluation_folder,
)
from permafrost.loading.subset import HOLDOUT
from permafrost.models.resolve import resolve_network
from permafrost.models.saved import SavedNetwork, TrainedModel
from permafrost.runs.folder import RunFolder, recorded_passes, saved_options
from permafrost.store.entries import StoreMismatchError
from permafrost.store.reader import Store, TeacherPass, logits_first

if TYPE_CHECKING:
    from permafrost.evaluation.forward import EvaluatedModel


logger = logging.getLogger("permafrost.evaluate")


def _comparing() -> list[str]:
    return [name for name, options in EVALUATORS.items() if options.compares]


def named_baselines(config: EvaluateConfig) -> set[str]:
    """Return the baselines that the requested evaluators name."""
    options = [
        getattr(config.evaluate, evaluator)
        for evaluator in _comparing()
        if evaluator in config.requested_evaluators
    ]
    return {option.baseline for option in options if option.baseline is not None}


def with_baselines(config: EvaluateConfig, runs: Mapping[str, str | None]) -> EvaluateConfig:
    """Return the config with each baseline that is a key of `runs` replaced by its run, or by None.

    Args:
        config: Options of the command.
        runs: Run of the student of each arm, None for the arm that is being evaluated.
    """
    changed = {}
    for evaluator in _comparing():
        options = getattr(config.evaluate, evaluator)
        if options.baseline in runs:
            changed[evaluator] = replace(options, baseline=runs[options.baseline])
    added = config.evaluate.added | changed
    return replace(config, evaluate=replace(config.evaluate, added=added))


def without_unknown_arms(config: EvaluateConfig, typed: Sequence[str]) -> EvaluateConfig:
    """Return the config without the baselines of an experiment that are arms of its sweep, and not runs.

    A single student is not compared with an arm, which has one student for each seed. A baseline that was typed stays,
    so that its absence is an error.

    Args:
        config: Options of the command.
        typed: Arguments of the command line.
    """
    if any(".baseline=" in word for word in typed):
        return config
    arms = {
        name
        for name in named_baselines(config)
        if not SavedNetwork(RunFolder(name).path / "distill").is_finished
    }
    for arm in sorted(arms):
        logger.info(
            "the comparison with baseline=%s is left out, as there is no run of that name (an arm is known in its "
            "sweep only); name a run with evaluate.<evaluator>.baseline=",
            arm,
        )
    return with_baselines(config, dict.fromkeys(arms))


# ---- inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """A model to evaluate, not built yet, with its store and its teacher passes."""

    store: Store
    passes: list[TeacherPass]
    fingerprint: str
    build: Callable[[], tuple[EvaluatedModel, TrainedModel]]
    others: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of other networks that the results depend on, by name, besides those of the passes."""


def open_student(config: EvaluateConfig) -> EvaluationInputs:
    """Open the student of the run and the passes that it is compared with, by default those it was trained on.

    Raises:
        ConfigError: If the run has no finished student, or evaluate.against names no pass.
        DamagedFileError: If the student's files are not those that its training wrote.
        StoreMismatchError: If a pass of the student is missing in the store.
    """
    student = RunFolder(config.run).path / "distill"
    trained = SavedNetwork(student).describe()
    if config.evaluate.against is not None:
        folder = RunFolder(config.run).path / evaluation_folder(config.evaluate.against)
        store, passes = open_against(config, config.evaluate.against, [saved_options(folder)])
    else:
        names = config.store.teacher or trained.teachers
        configs = map(saved_options, (student, RunFolder(config.run).path / "evaluate"))
        store, passes = open_evaluation_store(config, names, configs)
        if not (config.store.teacher or trained.teachers):
            passes = [teacher for teacher in passes if teacher.num_classes == trained.num_classes]
    passes = logits_first(passes)
    if len(passes) > 1:
        logger.info(
            "%s has %d teachers; agreement and maps are compared with %s",
            student,
            len(passes),
            passes[0].name,
        )
    known = [folder.name for folder in store.pass_folders()]
    if known and not passes:
        logger.warning(
            "%s was trained without a pass of %s, so its agreement with a teacher is not measured; to measure it, "
            "choose a pass with store.teacher: %s",
            student,
            store.path,
            ", ".join(known),
        )

    def build() -> tuple[EvaluatedModel, TrainedModel]:
        from permafrost.evaluation.forward import EvaluatedModel
        from permafrost.models.providers import resolve_device

        resolve_network(trained.config, store, "student")
        model, described = SavedNetwork(student).load(store.manifest.classes)
        compares = passes and passes[0].manifest.has_logits
        if compares and passes[0].num_classes != described.num_classes:
            raise StoreMismatchError(
                f"{student} has {described.num_classes} classes, {passes[0].folder} has {passes[0].num_classes}; "
                "set store.teacher, or evaluate.against, to a pass of the same classes"
            )
        device = resolve_device("evaluate.device", config.evaluate.device)
        return EvaluatedModel(network=model.to(device), input_size=described.input_size), described

    fingerprint = SavedNetwork(student).check()
    return EvaluationInputs(store=store, passes=passes, fingerprint=fingerprint, build=build)


def open_evaluation_store(
    config: EvaluateConfig, names: Sequence[str], configs: Iterable[Mapping[str, Any]]
) -> tuple[Store, list[TeacherPass]]:
    """Open the store that students are evaluated on, and its teacher passes.

    With evaluate.store, the passes are those of the same teachers in that store.

    Args:
        config: Options of the command.
        names: The passes in store.path that the student was trained on, of stored views, too. If it is empty (a student
            trained on labels), the pass is used that the run was compared with before, otherwise the only pass of the
            store, if it has one.
        configs: Configs of the run (`saved_options`), which keeps to the passes that they name.

    Raises:
        StoreMismatchError: If a name fits no pass or several.
    """
    training_store = Store(config.store.folder)
    names = [_canonical_name(training_store, name) for name in names]
    recorded = recorded_passes(configs, training_store.manifest.fingerprint)
    passes = training_store.resolve_passes(names, recorded)
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
        ConfigError: If the held-out records of one store would be selected in the other.
    """
    other = config.evaluate.store
    require(
        other is None or HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} selects records of the store that the student was trained on, but "
        f"evaluate.store={other} is a different store; name a split of that store",
    )
    return Store(config.store.at(other))


def open_against(
    config: EvaluateConfig, name: str, configs: Iterable[Mapping[str, Any]]
) -> tuple[Store, list[TeacherPass]]:
    """Open the store that students are evaluated on, and the pass of evaluate.against in it.

    Args:
        config: Options of the command.
        name: Value of evaluate.against.
        configs: As for `open_evaluation_store`.

    Raises:
        ConfigError: If the name is not that of one pass.
    """
    store = open_record_store(config)
    try:
        recorded = recorded_passes(configs, store.manifest.fingerprint)
        return store, store.resolve_passes((name,), recorded)
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

    teacher = config.teacher
    _refuse_holdout(config)
    if isinstance(teacher, NoModelConfig) or teacher.weights is None:
        raise ConfigError(
            "model=teacher needs the network of the teacher; name it with teacher= and teacher.weights="
        )
    store = open_record_store(config)
    teacher = resolve_network(teacher, store, "teacher")
    described = Network(teacher, store.manifest.classes).describe(reads_head=_reads_head(config))
    named = store.open_passes(config.store.teacher) if config.store.teacher else []
    passes = passes_of_teacher(
        RunFolder(config.run).path / TEACHER_EVALUATION, teacher, store, named
    )
    num_classes = described["classes"]
    if not _reads_head(config):  # its features may predict the labels of other classes than its own
        num_classes = len(store.manifest.classes)
        passes = [
            teacher_pass
            for teacher_pass in passes
            if teacher_pass.num_classes == num_classes or not teacher_pass.manifest.has_logits
        ]
    return EvaluationInputs(
        store=store,
        passes=passes,
        fingerprint=sha256_json(described),
        build=_building(config, teacher, store, num_classes),
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
    from permafrost.evaluation.other_networks import check_made_pass, first_made_pass
    from permafrost.models.network import Network

    student, teacher = config.student, config.teacher
    folder = RunFolder(config.run).path / NETWORK_EVALUATION
    _refuse_holdout(config)
    if isinstance(student, NoModelConfig) or student.weights is None:
        raise ConfigError(
            "model=network needs the network to evaluate; name it with student= and student.weights="
        )
    store = open_record_store(config)
    student = resolve_network(student, store, "student")
    num_classes = len(store.manifest.classes)
    described = Network(student, store.manifest.classes, "student").describe()
    of_features = [name for name in EVALUATORS if not EVALUATORS[name].reads_outputs]
    reading = [name for name in config.requested_evaluators if EVALUATORS[name].reads_outputs]
    require(
        described["classes"] == num_classes or not reading,
        f"student.classes={described['classes']} are not the {num_classes} classes of {store.path}, and "
        f"evaluators=[{','.join(reading)}] reads the network's classes; name evaluators of features, as in "
        f"evaluators=[{','.join(of_features)}]",
    )
    if isinstance(teacher, NoModelConfig) or teacher.weights is None:
        of_teacher = None
        passes = store.resolve_passes(
            config.store.teacher,
            recorded_passes([saved_options(folder)], store.manifest.fingerprint),
        )
    else:
        named = store.open_passes(config.store.teacher) if config.store.teacher else []
        passes = named or [store.open_pass(folder.name) for folder in store.pass_folders()]
        of_teacher = Network(teacher, store.manifest.classes).describe()
        teacher_passes = first_made_pass(folder, store, of_teacher["weights_sha256"], passes)
        check_made_pass(teacher, store, teacher_passes or named)
        passes = teacher_passes
    passes = [teacher_pass for teacher_pass in passes if teacher_pass.num_classes == num_classes]
    alone = of_teacher is not None and not passes
    return EvaluationInputs(
        store=store,
        passes=passes,
        fingerprint=sha256_json(described),
        build=_building(config, student, store, num_classes),
        others={"teacher network": sha256_json(of_teacher)} if alone else {},
    )


def _building(
    config: EvaluateConfig,
    network: ModelConfig,
    store: Store,
    num_classes: int,
) -> Callable[[], tuple[EvaluatedModel, TrainedModel]]:
    """Return the function that builds a given network, and describes it as the one of a training is described."""

    def build() -> tuple[EvaluatedModel, TrainedModel]:
        from permafrost.evaluation.other_networks import build_teacher

        model = build_teacher(
            network,
            store,
            config.evaluate.device,
            reads_head=_reads_head(config),
        )
        return model, TrainedModel(
            config=network,
            num_classes=num_classes,
            input_size=model.input_size,
        )

    return build


def _reads_head(config: EvaluateConfig) -> bool:
    return any(EVALUATORS[name].reads_outputs for name in config.requested_evaluators)


def _refuse_holdout(config: EvaluateConfig) -> None:
    """Raise ConfigError for the split that only a student of this store has."""
    require(
        HOLDOUT not in config.evaluate.splits,
        f"evaluate.splits={HOLDOUT} selects the records that a student's training left out; name a split of the store "
        f"for model={config.model}",
    )
