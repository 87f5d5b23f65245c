"""The students of a sweep: every variant with every grid point that applies to it, and every seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from permafrost.config.builder import to_plain_dict
from permafrost.config.compose import compose
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import TopKOptions, check_top_k
from permafrost.config.paths import place_paths
from permafrost.config.points import Point, iter_points, knows_option, point_arguments, point_label
from permafrost.config.sections import section_of
from permafrost.config.verbs import EvaluateConfig, SweepConfig, build_verb_config
from permafrost.core.digests import sha256_json
from permafrost.core.errors import require
from permafrost.evaluation.inputs import open_against, open_evaluation_store
from permafrost.loading.subset import HOLDOUT
from permafrost.models.resolve import resolve_distill
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import STUDENTS, PassRecords, RunFolder, identity, pass_inputs
from permafrost.runs.trackers import check_logger
from permafrost.store.reader import Store, logits_first
from permafrost.sweeps.runner import Student
from permafrost.sweeps.select import check_reported_epochs, check_selection
from permafrost.training.distill import StudentPlan
from permafrost.training.student_passes import open_student_store, with_named_passes

_OWN_SECTIONS = ("variants", "grid", "select", "seeds", "parallel", "run")


def plan_students(config: SweepConfig, base: Sequence[str]) -> list[Student]:
    """Plan every student of the sweep, with seeds outermost.

    Args:
        config: Options of the sweep.
        base: Overrides from the command line, shared by all variants.

    Raises:
        ConfigError: If variants, grid or options do not fit.
    """
    records = PassRecords(sorted(RunFolder(config.run).path.glob(f"{STUDENTS}/*/distill")))
    known: set[str] = set()
    planned: list[Student] = []
    for variant, point, trained, evaluate in compose_students(config, base):
        known |= set(point)
        evaluate = _with_splits(evaluate)
        check_reported_epochs(trained, evaluate)
        if config.select is not None:
            check_selection(config.select, trained, evaluate)
        planned.append(_plan_student(variant, point, trained, evaluate, records))
    for option in config.grid:
        require(
            option in known, f"grid: no variant has the option {option}; correct it or leave it out"
        )
    # Seeds are outermost, so that the students that finish first are comparable.
    students = [
        _with_seed(student, config.run, seed) for seed in config.seeds for student in planned
    ]
    names = [student.name for student in students]
    for student in students:
        require(
            names.count(student.name) == 1,
            f"grid: two points result in the same student of variant {student.variant}, one of them "
            f"{point_label(student.point)}; name each value once, and an option of only some variants in `variants`",
        )
    return [_with_baselines(student, students) for student in students]


def compose_students(
    config: SweepConfig, base: Sequence[str]
) -> Iterator[tuple[str, Point, DistillConfig, EvaluateConfig]]:
    """Iterate over each variant and point with its options, without reading a store.

    Args:
        config: Options of the sweep.
        base: As for `plan_students`.

    Raises:
        ConfigError: If variants or options do not fit.
    """
    shared = [argument for argument in base if section_of(argument) not in _OWN_SECTIONS]
    for variant, overrides in config.variants.items():
        arguments = [*shared, "trainer.num_threads=1", *overrides]
        for point in _points(arguments, config.grid):
            composed = compose("sweep", [*arguments, *point_arguments(point)])
            composed |= {"command": ["sweep", *base], "run": config.run}
            trained: DistillConfig = place_paths(build_verb_config("distill", composed))
            evaluate: EvaluateConfig = place_paths(build_verb_config("evaluate", composed))
            if config.executor != "serial":
                cores = config.cluster.cpus_per_student
                trained, evaluate = _limit_threads(trained, evaluate, cores)
            require(
                trained.trainer.ranks == 1 or config.executor == "serial",
                f"trainer.ranks={trained.trainer.ranks} in variant {variant}: ranks would wait for resources of other "
                "students; set executor=serial or trainer.ranks=1",
            )
            require(
                evaluate.model == "student",
                f"model={evaluate.model} is not supported in a sweep; evaluate that network with "
                f"permafrost evaluate model={evaluate.model}",
            )
            check_logger(trained.logger)
            yield variant, point, trained, evaluate


def _limit_threads(
    trained: DistillConfig, evaluate: EvaluateConfig, cores: float
) -> tuple[DistillConfig, EvaluateConfig]:
    """Set each decode_threads that is null to the cores of a student that shares its machine with others."""
    trainer, options = trained.trainer, evaluate.evaluate
    if trainer.decode_threads is None:
        threads = max(1, int(cores) // max(trainer.loader_processes, 1))
        trained = replace(trained, trainer=replace(trainer, decode_threads=threads))
    if options.decode_threads is None:
        options = replace(options, decode_threads=max(1, int(cores)))
        evaluate = replace(evaluate, evaluate=options)
    return trained, evaluate


def _with_splits(evaluate: EvaluateConfig) -> EvaluateConfig:
    """Return the options with splits that the store has, or raise ConfigError before any student is trained."""
    path = evaluate.store.at(evaluate.evaluate.store)
    manifest = Store(path).manifest
    splits = manifest.records
    if "top_k" in evaluate.requested_evaluators:
        numbers, classes = evaluate.evaluate.of(TopKOptions).k, len(manifest.classes)
        check_top_k("evaluate.top_k.k", numbers, classes, many=manifest.multi_label)
    options = evaluate.evaluate.on(splits)
    for split in options.splits:
        require(
            split in splits or split == HOLDOUT,
            f"evaluate.splits names {split}, but the splits of {path} are: {', '.join(sorted(splits))}; name one of "
            "them, or pack the data with data.test_fraction=0.1, which makes a split test",
        )
    return replace(evaluate, evaluate=options)


def _with_baselines(student: Student, students: Sequence[Student]) -> Student:
    """Replace evaluator baselines that are variants by their student of the same seed, or None for its own variant."""
    runs: dict[str, str | None] = {}
    variants = {other.variant for other in students}
    for name in sorted(student.evaluate.baselines - variants):
        require(
            SavedNetwork(RunFolder(name).path / "distill").is_finished,
            f"evaluate.<evaluator>.baseline={name} is neither a variant ({', '.join(sorted(variants))}) nor a run with "
            "a finished student; correct it",
        )
    for name in student.evaluate.baselines & variants:
        points = {
            other.name: other.point
            for other in students
            if (other.variant, other.seed) == (name, student.seed)
        }
        runs[name] = None if name == student.variant else matching_run(name, student.point, points)
    return replace(student, evaluate=student.evaluate.with_baselines(runs)) if runs else student


def baselines_first(students: Sequence[Student]) -> list[Student]:
    """Order students so that those that are baselines of others come first."""
    compared = {name for student in students for name in student.evaluate.baselines}
    return sorted(students, key=lambda student: student.name not in compared)


def _points(arguments: list[str], grid: dict[str, tuple[Any, ...]]) -> Iterator[Point]:
    """Iterate over the points of the options that a variant has.

    A choice of a config group, such as optimizer: [adam, sgd], may determine these options.
    """
    choices = {option: values for option, values in grid.items() if "." not in option}
    for choice in iter_points(choices):
        composed = compose("sweep", [*arguments, *point_arguments(choice)])
        options = {
            option: values
            for option, values in grid.items()
            if option not in choices and knows_option(composed, option)
        }
        yield from ({**choice, **point} for point in iter_points(options))


def _with_seed(student: Student, sweep: str, seed: int) -> Student:
    """Return a student of a seed. A run that is moved keeps its students, however they are evaluated."""
    trained = replace(student.distill, seed=seed)
    # Name that stands for the sweep's in the digests of its students.
    values = identity(to_plain_dict(trained), DistillConfig) | {"run": "untitled"}
    digest = sha256_json([values, student.fingerprints])
    name = f"{sweep}/{STUDENTS}/{student.variant}-seed{seed}-{digest[:8]}"
    return replace(
        student,
        seed=seed,
        distill=replace(trained, run=name),
        evaluate=replace(student.evaluate, run=name),
    )


def _plan_student(
    name: str, point: Point, trained: DistillConfig, evaluate: EvaluateConfig, records: PassRecords
) -> Student:
    """Return a student of any seed, with the full names of its passes, and what it reads.

    Args:
        name: Name of the variant.
        point: Point of the grid.
        trained: Options of the training.
        evaluate: Options of the evaluation.
        records: Passes that the sweep's students have read, to which it keeps.
    """
    store = open_student_store(trained, records)
    trained = with_named_passes(trained, store, records)
    plan = StudentPlan(resolve_distill(trained, store), RunFolder(trained.run).path, store)
    passes = plan.passes
    against, other = evaluate.evaluate.against, evaluate.evaluate.store
    if against is not None:
        evaluated, compared = open_against(evaluate, against, records)
    if against is None or other is None:
        evaluated, compared = open_evaluation_store(evaluate, evaluate.store.teacher, records)
    is_named = bool(evaluate.store.teacher) and not passes and against is None
    return Student(
        variant=name,
        point=point,
        seed=trained.seed,
        distill=trained,
        evaluate=evaluate,
        reads={"store": store.manifest.fingerprint, **pass_inputs(passes)},
        fingerprints=tuple(plan.inputs().values()),
        records=plan.records,
        evaluated=evaluated,
        compared=pass_inputs(logits_first(compared)) if is_named else {},
    )


def matching_run(variant: str, point: Point, candidates: Mapping[str, Point]) -> str:
    """Return the only run of a variant whose grid options agree with those of `point`.

    Args:
        variant: Name of the variant, for the message.
        point: Point of a student of another variant.
        candidates: Point of each run of the variant.

    Raises:
        ConfigError: If several runs agree, or none.
    """
    matches = [
        run
        for run, other in candidates.items()
        if all(point.get(option, value) == value for option, value in other.items())
    ]
    require(
        len(matches) == 1,
        f"baseline={variant} names a variant with {len(matches)} students that match one point of another variant; "
        "name a variant without separate options in grid",
    )
    return matches[0]
