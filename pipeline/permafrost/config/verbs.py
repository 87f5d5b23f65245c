"""Sections that each verb reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from permafrost.config.augment import AugmentOptions
from permafrost.config.builder import build_config
from permafrost.config.cluster import (
    ClusterConfig,
    ExecutorName,
    KubeRayClusterConfig,
)
from permafrost.config.data import PreviewConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EVALUATORS, EvaluateOptions, Frame
from permafrost.config.exchange import AttachConfig, IngestConfig, PassportOptions, ShareConfig
from permafrost.config.methods import MethodConfig, Mode
from permafrost.config.models import ModelConfig, NoModelConfig, whole_frame
from permafrost.config.options import Command, Options, Role, options_of
from permafrost.config.page_options import ReportOptions
from permafrost.config.store import PrecomputeConfig, StoreOptions
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import Logger, OptimizerOptions, TrainerOptions
from permafrost.core.errors import require, require_name

DEFAULT_EVALUATORS = ("accuracy", "localization")


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(Options):
    """Size of the sample that an estimate measures, and the questions that it answers."""

    section: ClassVar[str] = "estimate"

    shards: Annotated[int, Ge(1)] = 3
    """Number of shards to measure, drawn at random by store.seed; at least one is of `split`. If the data have
    fewer, some are measured in parts of shard_records."""
    shard_records: Annotated[int | None, Ge(1)] = 128
    """Largest number of records to measure of each of these shards; null takes all. A slow teacher needs few."""
    rounds: Annotated[int, Ge(1)] = 5
    """Number of steps to measure of a student with stored targets and, in turn, of one with a live teacher and of
    students with other options of the trainer. On a GPU each measurement takes several steps."""
    students: Annotated[int, Ge(1)] = 10
    """Number of students of the comparison with one job, in which they share batches, views and a live teacher."""
    views: tuple[int, ...] = (0, 1, 4, 16, 50)
    """Numbers of stored views of `augment` whose price is printed; 0 are frozen targets of the whole image."""
    budget_bytes: Annotated[int | None, Ge(0)] = None
    """Largest number of bytes of the targets, for which a setting is proposed; null for no limit."""
    max_distance: Annotated[float | None, Ge(0)] = None
    """Largest distance of the targets of a view to the teacher's answer to it, of every payload (KL in nats, or 1 -
    cosine), for which a setting is proposed; null for no limit."""
    records: Annotated[int | None, Ge(1)] = None
    """Number of records to estimate for, such as those of a set that is not here; null takes those of the data."""
    workers: tuple[int, ...] = (1, 4, 16)
    """Numbers of workers for which hours are printed. A worker is an actor on a machine like this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.workers) > 0 and min(self.workers) >= 1,
            f"estimate.workers={list(self.workers)} must list at least one number, each >= 1, as in "
            "estimate.workers=[1,4,16]",
        )
        require(
            len(self.views) > 0 and min(self.views) >= 0,
            f"estimate.views={list(self.views)} must list at least one number, each >= 0, as in "
            "estimate.views=[0,1,16]",
        )


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(PrecomputeConfig):
    """Sections that `estimate` reads: those of precompute, and those of distill that describe a student."""

    estimate: EstimateOptions = field(default_factory=EstimateOptions)
    student: ModelConfig
    method: MethodConfig
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    mode: Mode = "frozen"
    """Origin of the student's targets, as in distill: frozen or replay. It is compared with mode=live."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Options):
    """Sections that `verify` reads."""

    store: StoreOptions
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network that is said to have made the passes of store.teacher, or the only one: it is run on a sample of their
    views, and its agreement with them is written into their manifests."""
    passport: PassportOptions = field(default_factory=PassportOptions)


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """Content and file of the picture of a store."""

    section: ClassVar[str] = "show"

    split: str | None = None
    """Split whose records are shown; null shows train, or the first split of a store without it."""
    records: Annotated[int, Ge(1), Le(200)] = 24
    """Number of records that are shown."""
    output: str = "store.png"
    """File of the picture: .png, .svg or .pdf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.output.endswith((".png", ".svg", ".pdf")),
            f"show.output={self.output} must end with .png, .svg or .pdf",
        )


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Options):
    """Sections that `show` reads."""

    store: StoreOptions
    show: ShowOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Programs that `export` writes."""

    section: ClassVar[str] = "export"

    formats: tuple[Literal["onnx", "torch"], ...] = ("onnx", "torch")
    """Formats of the programs. onnx: student.onnx, for ONNX runtimes. torch: student.pt2, for torch.export.load."""
    output: Literal["logits", "pooled"] = "logits"
    """Output of the programs. pooled: the features before the classifier, in embedding.onnx and embedding.pt2, for
    students of embeddings."""
    frame: Frame = "auto"
    """Part of an image that the student receives, as evaluate.frame."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.formats) > 0, "export.formats is empty; name onnx, torch or both")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """Sections that `export` reads; the student is the one of `run`."""

    store: StoreOptions
    export: ExportOptions
    to: str = ""
    """hf://<user>/<name>, a repository of the Hugging Face hub that gets the folder with its card (needs
    huggingface_hub and student.license); empty uploads nothing."""
    run: str = "untitled"
    """Folder below runs/ of the student to export."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun(Options):
    """Options shared by all evaluators of an evaluation, which identify its folder."""

    store: StoreOptions
    evaluate: EvaluateOptions
    run: str = "untitled"
    """Folder below runs/ of the student to evaluate."""
    command: Command = ()
    """Command that evaluated it; of a student of a sweep, the sweep's."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationRun):
    """Sections that `evaluate` reads; the student is the one of `run`. Only evaluators=equivariance reads `augment`."""

    evaluators: tuple[str, ...] | None = None
    """Evaluators to run; null is accuracy and, if there are regions or a teacher's maps, localization. Each is
    a separate unit of work, so a later call may add one. evaluate.shift.pixels adds shift."""
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
        wants_shift = self.evaluate.shift.pixels is not None and "shift" not in evaluators
        return (*evaluators, "shift") if wants_shift else evaluators

    @property
    def shared(self) -> EvaluationRun:
        """Config without the options that only some evaluators read."""
        return EvaluationRun(
            store=self.store, evaluate=self.evaluate, run=self.run, command=self.command
        )


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Options):
    """Sections that `sweep` reads in addition to those of distill and evaluate."""

    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Mapping from an arm's name to its overrides of the distill options."""
    cluster: ClusterConfig
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Mapping from a distill option to values; each arm runs with every combination of the options that it has."""
    select: str | None = None
    """Metric <split>.<metric> that selects each arm's grid point, by the mean over seeds; null selects none.
    Only the students of that point are evaluated on evaluate.splits. The split is `holdout` (subset.holdout) or
    another of the store."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; every arm is trained once per seed."""
    executor: ExecutorName = "auto"
    """Executor of the work: Ray, or this process alone (serial). auto: serial with cluster=local if only one
    student is missing, if parallel=1 or if this machine has one CPU; Ray otherwise."""
    parallel: Annotated[int | None, Ge(1)] = None
    """Largest number of students that Ray trains in parallel, one thread each. null: the number that
    cluster.cpus_per_student and cluster.gpus_per_student allow."""
    run: str = "untitled"
    """Folder below runs/, as in precompute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.arms) > 0,
            "arms is empty; choose experiment=... or set arms={name: [overrides]}",
        )
        for arm in self.arms:
            require_name("arms", arm)
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
        known = [s.name for s in fields(DistillConfig) if s.name not in excluded_options]
        require(
            option.split(".")[0] in known,
            f"grid: {option} is not an option of a student; it may name those of {', '.join(known)}",
        )
        require(len(values) > 0, f"grid.{option} is empty; set at least one value")
        require(
            all(value not in values[:i] for i, value in enumerate(values)),
            f"grid.{option} lists a value twice: {list(values)}",
        )


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Sections that `report` reads."""

    store: StoreOptions
    augment: AugmentOptions
    report: ReportOptions
    run: str = "untitled"
    """Folder below runs/ of the sweep or student to report."""


@dataclass(frozen=True, kw_only=True)
class RenderConfig(Options):
    """Sections that `render` reads; all other words are those of the verb that the job runs."""

    cluster: KubeRayClusterConfig
    verb: Literal[
        "preview",
        "estimate",
        "precompute",
        "teach",
        "verify",
        "distill",
        "evaluate",
        "sweep",
        "report",
    ] = "precompute"
    """Stage that the job runs."""
    words: Annotated[tuple[str, ...], Role.SET_BY_STAGE] = ()
    """Words of the verb, as they were typed."""
    output: str | None = None
    """File to write; null prints the manifest."""


VERBS: dict[str, type[Any]] = {
    "preview": PreviewConfig,
    "estimate": EstimateConfig,
    "precompute": PrecomputeConfig,
    "ingest": IngestConfig,
    "teach": TeachConfig,
    "verify": VerifyConfig,
    "show": ShowConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
    "share": ShareConfig,
    "attach": AttachConfig,
    "render": RenderConfig,
}


def build_verb_config(verb: str, composed: dict[str, Any]) -> Any:
    """Build the verb's dataclass from a composed dict of all sections, ignoring sections that it does not read.

    Raises:
        ConfigError: If an option is unknown or has no such value, or if `run` is no name of a folder.
    """
    names = {option.name for option in options_of(VERBS[verb])}
    config = build_config(VERBS[verb], {k: v for k, v in composed.items() if k in names})
    if hasattr(config, "run"):
        require_name("run", config.run, may_have_folders=True)
    return config
