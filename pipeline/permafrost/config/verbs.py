"""Verbs: the sections that each reads, and how it is shown."""

from __future__ import annotations

import ast
import logging
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Ge

from permafrost.config.augment import AugmentOptions
from permafrost.config.builder import build_config
from permafrost.config.cluster import ClusterConfig, SharedExecutorName
from permafrost.config.data import PreviewConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EVALUATORS, EvaluateOptions
from permafrost.config.families import FAMILIES
from permafrost.config.models import ModelConfig, NoModelConfig, whole_frame
from permafrost.config.options import Command, Options, Role, options_of
from permafrost.config.plugins import Family
from permafrost.config.store import PrecomputeConfig, StoreOptions
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import Logger
from permafrost.core.errors import ConfigError, require, require_name

logger = logging.getLogger("permafrost.evaluate")

DEFAULT_EVALUATORS = ("accuracy", "localization")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Sections that `verify` reads."""

    store: StoreOptions


@dataclass(frozen=True, kw_only=True)
class DiffConfig(Options):
    """Options that `diff` reads."""

    old: str = ""
    """Store's folder, folder of a pass, or run as in `run=`; the first argument of the command without a name."""
    new: str = ""
    """Store, pass or run that it is compared with; the second argument without a name."""
    output: Annotated[str, Role.FILE] = ""
    """File to which the differences are written as JSON; empty writes none."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(Options):
    """Options shared by all evaluators of an evaluation, which identify its folder."""

    store: StoreOptions
    evaluate: EvaluateOptions
    run: str = ""
    """Folder below runs/ of the student to evaluate."""
    command: Command = ()
    """Command that evaluated it; of a student of a sweep, the sweep's."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationRun):
    """Sections that `evaluate` reads; the student is the one of `run`. `augment` is read by some evaluators only."""

    evaluators: tuple[str, ...] | None = None
    """Evaluators to run; null is accuracy and, if there are regions or a teacher's maps, localization. Each is
    a separate unit of work, so a later call may add one."""
    model: Literal["student", "teacher", "network"] = "student"
    """Network to evaluate: the run's student, the network of `teacher` (results in evaluate-teacher), or the
    given network of `student` and student.weights, which no run has trained (results in evaluate-network)."""
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network of the student's teacher pass, for evaluators that run it again; teacher.weights=null names none.
    With model=network it needs no pass, and chooses the pass that it made if the store has several."""
    student: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network to evaluate with model=network, read with that option only."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    logger: Logger = "tensorboard"
    """Tracker that gets the results, as in distill: those of a student in the tracker's run of its training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluators is not None:
            require(
                len(self.evaluators) > 0,
                "evaluators is empty; name at least one, or set it to null",
            )
            unknown = [evaluator for evaluator in self.evaluators if evaluator not in EVALUATORS]
            require(
                not unknown,
                f"evaluators must be among {', '.join(EVALUATORS)}; got {', '.join(unknown)}",
            )
            require(
                len(set(self.evaluators)) == len(self.evaluators),
                f"evaluators lists an evaluator twice: {', '.join(self.evaluators)}",
            )
        uses_teacher = any(
            EVALUATORS[evaluator].uses_teacher for evaluator in self.requested_evaluators
        )
        against = self.evaluate.against
        require(
            against is None or self.model == "student",
            f"evaluate.against={against} names the pass that a student is compared with; set evaluate.against=null "
            f"for model={self.model}",
        )
        # An experiment may name networks for all verbs; unread, they must not change the identity. With
        # model=network the teacher chooses the pass, whatever the evaluators.
        if self.model == "student" and not uses_teacher:
            object.__setattr__(self, "teacher", NoModelConfig())
        if self.model != "network":
            object.__setattr__(self, "student", NoModelConfig())
        object.__setattr__(self, "student", whole_frame(self.student))

    @property
    def requested_evaluators(self) -> tuple[str, ...]:
        """Evaluators that this call is to run."""
        evaluators = DEFAULT_EVALUATORS if self.evaluators is None else self.evaluators
        return tuple(dict.fromkeys([*evaluators, *self.evaluate.requested]))

    @property
    def reads_outputs(self) -> bool:
        """True if a requested evaluator reads the network's classes, and not only its features."""
        return any(EVALUATORS[evaluator].reads_outputs for evaluator in self.requested_evaluators)

    @property
    def baselines(self) -> set[str]:
        """Baselines that the requested evaluators name."""
        return {
            getattr(self.evaluate, evaluator).baseline
            for evaluator in self.requested_evaluators
            if EVALUATORS[evaluator].compares
        } - {None}

    def with_baselines(self, runs: Mapping[str, str | None]) -> EvaluateConfig:
        """Return the config with each baseline that is a key of `runs` replaced by its run, or by None.

        Args:
            runs: Run of the student of each variant, None for the variant that is being evaluated.
        """
        comparing = [name for name, options in EVALUATORS.items() if options.compares]
        options = {name: getattr(self.evaluate, name) for name in comparing}
        changed = {
            name: replace(section, baseline=runs[section.baseline])
            for name, section in options.items()
            if section.baseline in runs
        }
        return replace(self, evaluate=replace(self.evaluate, added=self.evaluate.added | changed))

    @property
    def shared(self) -> EvaluationRun:
        """Config without the options that only some evaluators read."""
        return EvaluationRun(
            store=self.store, evaluate=self.evaluate, run=self.run, command=self.command
        )


ONLY_VARIANT = "student"
"""Name of the variant of a sweep that has a grid and no variants."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Options):
    """Sections that `sweep` reads in addition to those of distill and evaluate."""

    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Mapping from a variant's name to its overrides of the distill options; without any, a grid has one."""
    cluster: ClusterConfig
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Mapping from a distill option to values; each variant runs with every combination of the options that it has."""
    select: str | None = None
    """Metric <split>.<metric> that selects each variant's grid point, by the mean over seeds; null selects none.
    Only the students of that point are evaluated on evaluate.splits. The split is `holdout` (subset.holdout) or
    another of the store."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every variant is trained once per seed."""
    executor: SharedExecutorName = "auto"
    """Executor of the work: Ray, this process alone (serial), or this process as a task of a job array
    (array), of which each start of the same command does a part. auto: serial with cluster=local if only one
    student is missing, if parallel=1, if this machine has one CPU, or if the students take less than a minute of a core
    by an estimate; Ray otherwise."""
    parallel: Annotated[int | None, Ge(1)] = None
    """Largest number of students that Ray trains in parallel, one thread each. null: the number that
    cluster.cpus_per_student and cluster.gpus_per_student allow."""
    run: str = ""
    """Folder below runs/ for the results; an absolute path is taken as it is (required on a cluster)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid and not self.variants:
            object.__setattr__(self, "variants", {ONLY_VARIANT: ()})
        require(
            len(self.variants) > 0,
            "variants is empty; choose experiment=..., or set variants={name: [overrides]} or grid={option: [values]}",
        )
        for variant in self.variants:
            require_name("variants", variant)
        require(len(self.seeds) > 0, "seeds is empty; set at least one, as in seeds=[0,1,2]")
        require(
            len(set(self.seeds)) == len(self.seeds), f"seeds lists a seed twice: {list(self.seeds)}"
        )
        require(
            self.select is None or all(self.select.partition(".")[::2]),
            f"select must be <split>.<metric>, as in holdout.accuracy; got {self.select}",
        )
        for option, values in self.grid.items():
            self._check_axis(option, values)

    def _check_axis(self, option: str, values: tuple[Any, ...]) -> None:
        excluded_options = ("seed", "run", "cluster", "command")
        known = [
            section.name
            for section in fields(DistillConfig)
            if section.name not in excluded_options
        ]
        if option.split(".")[0] not in known:
            having = [f"{name}.{option}" for name in known if _has_option(name, option)]
            hint = (
                f"write {' or '.join(having)}"
                if having
                else f"it may name those of {', '.join(known)}"
            )
            raise ConfigError(f"grid: {option} is not an option of a student; {hint}")
        require(len(values) > 0, f"grid.{option} is empty; set at least one value")
        require(
            all(value not in values[:position] for position, value in enumerate(values)),
            f"grid.{option} lists a value twice: {list(values)}",
        )


def _has_option(section: str, option: str) -> bool:
    """Return whether a section of distill, or a member of it, has an option."""
    hint = next(part.hint for part in options_of(DistillConfig) if part.name == section)
    return any(
        option in {part.name for part in options_of(cls)}
        for cls in ([*FAMILIES[section].values()] if section in FAMILIES else [hint])
        if isinstance(cls, type) and issubclass(cls, Options)
    )


# ---- verbs -----------------------------------------------------------------------------------------


class Plan(ABC):
    """Work of a verb, complete when it is made: `run` does what `describe_work` says."""

    @abstractmethod
    def describe_work(self) -> dict[str, str]:
        """Return what is read, computed and written, by name, as `--plan` prints it."""

    @abstractmethod
    def run(self) -> Any:
        """Do what is missing, and return the result, a dataclass whose values are printed."""

    def close(self) -> None:  # noqa: B027, most plans hold nothing
        """Release what the plan holds until it has run, such as a lock."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A command: what it takes, what it runs, and how the command line, jobs and the Python interface show it.

    The docstring of the module of its function is its help: a sentence, commands, then what it `Reads` and `Writes`,
    and what a `Rerun` does.
    """

    options: type[Options]
    """Class of the sections that it reads. With a section `cluster` it runs on Ray, and a submitted job joins its
    cluster; with an option `run` it works in a folder of runs/."""
    function: str
    """Function of the work, as module:name, which is imported when the command runs. It takes the options, and
    returns a dataclass, whose values are printed."""
    plan: str = ""
    """Function of the same arguments that returns the `Plan` of the work, as module:name, for --plan. Empty for a verb
    without one."""
    order: int = 100
    """Place in lists of verbs: preview is 10, precompute 20, teach 30, verify 40, distill 50, evaluate 60, sweep 70."""
    group: str = "report"
    """Group in `permafrost --help`: data, teacher, student or report, or one of a package's own, which comes last."""
    common: str = ""
    """Options that --help shows, at most 15, between blanks: section.option, or a section with members. Empty shows the
    first 15 of all options, which --help all lists."""
    python: str = ""
    """Docstring of `permafrost.<verb>()`; empty is the first sentence of the help."""
    swept: tuple[str, ...] = ()
    """Verbs whose options it takes, too, for each of the students that it trains. Its function then also takes the
    arguments of the command."""
    needs_run: bool = True
    """False for a verb with an option `run` that also works without one, and then writes to no run."""
    needs_teacher: bool = False
    """True if an argument or an experiment must name the teacher, or say that there is none."""
    takes_store_of_run: bool = False
    """True if a store.path that nothing names is the store from which the networks of `run` were trained."""
    saves_options: bool = False
    """True if its options are written to runs/<run>/<verb>.yaml, of a verb that needs none only if there is a run."""
    locks_run: bool = False
    """True if no other process may work in its run. The folders of single trainings have separate locks."""
    checks_teacher: bool = False
    """True if it runs a teacher only to check it, and only if it is typed: an experiment names it for other verbs."""
    suggested_arguments: tuple[str, ...] = ("store.teacher=",)
    """Prefixes of arguments that are kept where a verb suggests this one as the next command of its experiment."""
    typed_arguments: tuple[str, ...] = ("run=", "store.path=")
    """Prefixes of arguments of the earlier command that this one then takes over."""
    positional: tuple[str, ...] = ()
    """Options that arguments without a name set, in their order."""
    check_arguments: Callable[[Sequence[str], dict[str, Any], Any], None] | None = None
    """Function of the arguments, composed values and options. Raises ConfigError for an argument that is not read."""

    @property
    def help(self) -> str:
        """Docstring of the function's module, which is not imported, as that takes longer than its help."""
        spec = None
        with suppress(ModuleNotFoundError):  # `load` names it
            spec = find_spec(self.function.partition(":")[0])
        source = getattr(spec.loader, "get_source", None) if spec is not None else None
        text = source(spec.name) if source is not None and spec is not None else None
        return ast.get_docstring(ast.parse(text or "")) or ""

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ConfigError: If there is no such module, or no such function in it.
        """
        module, _, name = self.function.partition(":")
        try:
            function: Callable[..., Any] | None = getattr(import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # of a package that the module needs
            function = None
        if not callable(function):
            raise ConfigError(
                f"Verb(function={self.function!r}): there is no such function; write <module>:<function>"
            )
        return function


def _check_live_arguments(arguments: Sequence[str], composed: dict[str, Any], config: Any) -> None:
    """Raise ConfigError for typed teacher options that `distill` does not read; an experiment may set them."""
    for argument in () if composed["mode"] == "live" else arguments:
        require(
            not argument.startswith(("teacher=", "teacher.", "explainer=", "explainer.")),
            f"distill reads {argument} with mode=live only; frozen targets come from the store: "
            "choose the pass with store.teacher=",
        )


def _check_evaluate_arguments(
    arguments: Sequence[str], composed: dict[str, Any], config: Any
) -> None:
    """Raise ConfigError for a typed section that `evaluate` does not read."""
    reads_teacher = config.teacher.kind == composed["teacher"]["kind"]
    asking = [name for name, options in EVALUATORS.items() if options.uses_teacher]
    readers = [name for name, options in EVALUATORS.items() if options.reads_augment]
    for argument in arguments:
        section = argument.split("=", 1)[0].split(".")[0]
        require(
            section != "student" or config.model == "network",
            f"evaluate reads {argument} with model=network only; the student of a run is named by run=",
        )
        if section == "teacher" and not reads_teacher:
            logger.warning(
                "%s is not read: only model=teacher and the evaluators %s run the teacher, and its stored targets are "
                "chosen by store.teacher=",
                argument,
                ", ".join(asking),
            )
        require(
            section != "augment" or bool(set(readers) & set(config.requested_evaluators)),
            f"evaluate reads {argument} with evaluators=[{', '.join(readers)}] only",
        )


VERBS: Family[Verb] = Family(
    {
        "preview": Verb(
            options=PreviewConfig,
            function="permafrost.verbs.preview:preview_data",
            order=10,
            group="data",
            common=(
                "data data.path data.label data.labels data.split data.only_classes "
                "data.test_fraction data.group data.exclude data.on_error data.accept "
                "preview.files preview.all against executor"
            ),
        ),
        "precompute": Verb(
            options=PrecomputeConfig,
            function="permafrost.verbs.precompute:precompute_store",
            plan="permafrost.verbs.precompute:plan_precompute",
            order=20,
            group="data",
            common=(
                "store.path data data.path data.test_fraction store.image_size teacher "
                "teacher.name teacher.weights teacher.input_size teacher.frame teacher.mean "
                "teacher.std annotate.outputs explainer executor"
            ),
            needs_run=False,
            needs_teacher=True,
            saves_options=True,
            suggested_arguments=("teacher", "store.teacher="),
        ),
        "teach": Verb(
            options=TeachConfig,
            function="permafrost.training.teach:teach_network",
            plan="permafrost.training.teach:plan_teacher",
            order=30,
            group="teacher",
            common=(
                "store.path run teacher teacher.name teaching teaching.split teaching.start "
                "teaching.loss teaching.augment teaching.augment.size teaching.trainer.epochs "
                "teaching.trainer.batch_size teaching.optimizer.lr evaluate.splits seed"
            ),
            needs_teacher=True,
            typed_arguments=("run=", "store.path=", "teacher."),
        ),
        "verify": Verb(
            options=VerifyConfig,
            function="permafrost.verbs.verify:verify_bytes",
            order=40,
            group="data",
            common="store.path store.cache store.allow_links",
        ),
        "diff": Verb(
            options=DiffConfig,
            function="permafrost.verbs.diff:compare_two",
            order=46,
            common="old new output",
            positional=("old", "new"),
        ),
        "distill": Verb(
            options=DistillConfig,
            function="permafrost.training.distill:distill_student",
            plan="permafrost.training.distill:plan_student",
            order=50,
            group="student",
            common=(
                "store.path run student student.name student.weights method method.tau augment "
                "trainer.epochs trainer.batch_size optimizer.lr subset.shots seed "
                "store.teacher mode"
            ),
            check_arguments=_check_live_arguments,
        ),
        "evaluate": Verb(
            options=EvaluateConfig,
            function="permafrost.evaluation.evaluate:evaluate_run",
            plan="permafrost.evaluation.evaluate:plan_evaluation",
            order=60,
            group="student",
            common=(
                "run store.path evaluate.splits evaluators model evaluate.store "
                "evaluate.against evaluate.frame evaluate.threshold evaluate.batch_size "
                "evaluate.device teacher teacher.weights student student.weights"
            ),
            takes_store_of_run=True,
            check_arguments=_check_evaluate_arguments,
        ),
        "sweep": Verb(
            options=SweepConfig,
            function="permafrost.verbs.sweep:sweep_students",
            plan="permafrost.verbs.sweep:plan_sweep",
            order=70,
            group="student",
            common=(
                "store.path run variants grid seeds select executor parallel student "
                "student.name method augment trainer.epochs subset.holdout evaluate.splits"
            ),
            swept=("distill", "evaluate"),
            saves_options=True,
            locks_run=True,
        ),
    }
)
"""Commands of `permafrost` by name. A package adds its own, or replaces one by a verb that does more (`replace`)."""


SWEEP_SUMMARIES: Family[str] = Family({})
"""Texts that packages have printed after a sweep, by name: module:name of functions (run) -> text."""


def report_command(store: str, run: str) -> str:
    """Return the command that reports a run, empty if no package adds the verb."""
    arguments = ["permafrost", "report", f"store.path={store}", f"run={run}"]
    return shlex.join(arguments) if "report" in VERBS else ""


def option_classes(verb: str) -> list[type[Options]]:
    """Return the classes of the options that a verb takes: its own, then those of the students that it trains."""
    return [VERBS[name].options for name in (verb, *VERBS[verb].swept)]


def build_verb_config(verb: str, composed: dict[str, Any]) -> Any:
    """Build the verb's dataclass from a composed dict of all sections, ignoring sections that it does not read.

    Raises:
        ConfigError: If an option is unknown or has no such value, or if `run` is not a folder name.
    """
    names = {option.name for option in options_of(VERBS[verb].options)}
    _require_named(verb, composed)
    config = build_config(
        VERBS[verb].options, {name: value for name, value in composed.items() if name in names}
    )
    if run := getattr(config, "run", ""):
        require_name("run", run, may_have_folders=True)
    return config


def _require_named(verb: str, composed: Mapping[str, Any]) -> None:
    """Raise ConfigError if a store or a run that a verb needs has no name."""
    names = {option.name for option in options_of(VERBS[verb].options)}
    missing = {}
    if "store" in names and composed.get("store", {}).get("path") == "":
        missing["store.path"] = "stores/photos"
    suffices = VERBS[verb].takes_store_of_run and bool(missing)
    if "run" in names and composed.get("run") == "" and (VERBS[verb].needs_run or suffices):
        missing = ({} if suffices else missing) | {"run": "photos"}
    arguments = " ".join(f"{option}={example}" for option, example in missing.items())
    require(
        not missing,
        f"{verb} needs {' and '.join(f'{option}=' for option in missing)}, as in {arguments}",
    )
