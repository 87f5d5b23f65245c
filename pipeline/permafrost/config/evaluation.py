"""Options of an evaluation (`evaluate=`), and of its evaluators, each with a section named after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from annotated_types import Ge, Lt

from permafrost.config.options import OpenOptions, Options, Role
from permafrost.config.plugins import Family
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class EvaluatorOptions(Options):
    """Base class of the options of an evaluator, also used for evaluators without options."""

    order: ClassVar[int] = 100
    """Place in a report: accuracy is 10, localization 20, knn 50, linear_probe 60."""
    is_flat: ClassVar[bool] = False
    """True if its metrics are stored next to `records` in metrics.json rather than below its name."""
    uses_teacher: ClassVar[bool] = False
    """True if it may run the teacher network itself; all other evaluators do not read `teacher`."""
    compares: ClassVar[bool] = False
    """True if it compares with another run, named by its option `baseline`."""
    reads_augment: ClassVar[bool] = False
    """True if it applies the operations and mixtures of `augment`; all other evaluators do not read that section."""
    reads_threshold: ClassVar[bool] = False
    """True if its results depend on evaluate.threshold."""
    reads_outputs: ClassVar[bool] = True
    """False if it reads features only, so that the network's classes may be others than those of the data."""

    @property
    def is_requested(self) -> bool:
        """Whether its options alone have it run, without `evaluators`."""
        return False


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(EvaluatorOptions):
    """Accuracy, overall and by group, and agreement with the teacher."""

    implementation: ClassVar[str] = "permafrost.evaluation.basic_evaluators:ACCURACY"
    reads_threshold: ClassVar[bool] = True
    order: ClassVar[int] = 10
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class LocalizationOptions(EvaluatorOptions):
    """EPG and IoU of explanations, and their cosine with the teacher's stored maps."""

    implementation: ClassVar[str] = "permafrost.evaluation.basic_evaluators:LOCALIZATION"
    order: ClassVar[int] = 20
    is_flat: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TopKOptions(EvaluatorOptions):
    """Top-k accuracy: how often the label is among the k classes of the highest logits."""

    section: ClassVar[str] = "evaluate.top_k"
    implementation: ClassVar[str] = "permafrost.evaluation.basic_evaluators:TOP_K"
    order: ClassVar[int] = 15

    k: tuple[int, ...] = ()
    """Values of k, from 1 to one below the number of classes; empty is 5, or the largest if there are fewer classes."""


def check_top_k(option: str, numbers: Sequence[int], classes: int, *, many: bool) -> None:
    """Raise ConfigError for a k below 1 or for which every label counts, and for many labels."""
    require(
        not (numbers and many),
        f"{option}={list(numbers)} needs one label per record, but records of this store have many; leave it out",
    )
    require(
        all(1 <= k < classes for k in numbers),
        f"{option}={list(numbers)} must have numbers from 1 to {classes - 1}, one below the number of classes",
    )


@dataclass(frozen=True, kw_only=True)
class FeatureProbeOptions(EvaluatorOptions):
    """Options of the evaluators that learn labels from a network's pooled features."""

    reads_outputs: ClassVar[bool] = False

    train_split: str = "train"
    """Split to learn from, without the evaluated records."""
    train_subset: Literal["all", "student"] = "all"
    """Records of that split to learn from. all: any of them, whatever subset the student was trained on. student: those
    that the student was trained on (its subset.shots, seed, holdout and rule), with their labels only."""
    train_records: Annotated[int, Ge(2)] = 50_000
    """Maximum number of records to learn from. If the split has more, they are drawn with a fixed seed. Their features
    are kept in memory."""


EVALUATORS: Family[type[EvaluatorOptions]] = Family(
    {"accuracy": AccuracyOptions, "localization": LocalizationOptions, "top_k": TopKOptions}
)
"""Evaluators in the order in which a report shows them."""


def feature_probes() -> list[str]:
    """Return the evaluators that learn labels from features, as far as their packages are installed."""
    return [
        name for name, options in EVALUATORS.items() if issubclass(options, FeatureProbeOptions)
    ]


# ---- evaluation ------------------------------------------------------------------------------------


Frame = Literal["auto", "center_crop", "full"]
"""Part of an image that a network receives: all of it, the standard crop, or the one that fits its input."""
E = TypeVar("E", bound=EvaluatorOptions)


TEST_SPLITS = ("test", "val", "validation", "valid")
"""Names of splits that are not trained on, in the order in which one is chosen."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(OpenOptions):
    """Options of an evaluation that all evaluators share, and a section for each evaluator with options of its own.

    A section belongs to its evaluator's results, not to the identity of the evaluation.
    """

    section: ClassVar[str] = "evaluate"

    store: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY] = None
    """Another store to evaluate on, which must contain a pass of the same teacher. It serves data-free
    transfer: a student that learned its teacher's classes from other images is evaluated on the teacher's
    own."""
    against: Annotated[str | None, Role.OUTSIDE_IDENTITY] = None
    """Pass of the evaluated store that the student is compared with (agreement, maps, features), named as in
    store.teacher; null is the pass that it was trained on. The results are in runs/<run>/evaluate-against-<pass>, so
    a student may be compared with several teachers, such as its assistant and the first teacher."""
    splits: tuple[str, ...] = ()
    """Splits of the store to evaluate; `holdout` is the part that subset.holdout kept out of the student's
    training. Empty takes test, or else the split for validation."""
    batch_size: Annotated[int, Ge(1)] = 256
    """Records per batch."""
    frame: Annotated[Frame, Role.OUTSIDE_IDENTITY] = "auto"
    """Part of an image that is evaluated, whose value is part of the results. full: all of it. center_crop: the
    standard crop of 7/8 of the shorter side in the original's proportions. auto: what the student's training showed,
    full unless its recipe has resized_crop; what its pass has for a teacher; and for a given network full if its
    input is the canonical frame, center_crop otherwise."""
    region: Literal["boxes", "masks"] = "boxes"
    """Region that an explanation should cover, for EPG and IoU; with several labels per record, mask values are
    class + 1."""
    iou_threshold: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Threshold of IoU on the map scaled to [0, 1]; pixels strictly above it count."""
    threshold: Annotated[float | str | None, Role.OUTSIDE_IDENTITY] = None
    """Probability from which a class is predicted where records have many labels; null is that of an earlier call, at
    first 0.5. The name of a split, such as val, chooses it for each class, of the student and of its teacher: the one
    with the highest F1 on that split of the store that the student was trained on. Both are stored with the run, and
    taken from there on other stores."""
    group_sets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Mapping from name to groups that are scored together, in addition to each group alone; for Waterbirds
    {id: [0, 3], ood: [1, 2]}."""
    random_networks: Annotated[int | None, Ge(0), Role.OUTSIDE_IDENTITY] = None
    """Number of untrained networks of the same architecture that every evaluator also measures, as a level to compare
    with: 5 shows their spread. The store keeps their results for other students. null is the number of an earlier call,
    at first 0."""
    num_pictures: Annotated[int, Ge(0)] = 8
    """Number of records whose maps are kept for the report, about the same number from each split."""
    device: str = "auto"
    """Device of torch; auto takes a GPU if there is one."""
    decode_threads: Annotated[int | None, Ge(1), Role.OUTSIDE_IDENTITY] = None
    """Threads that decode a batch; null takes the cores, at most 8. Files below 4 kB on average are decoded in
    one thread."""

    @classmethod
    def added_by(cls) -> tuple[tuple[str, type[Options]], ...]:
        return tuple((name, options) for name, options in EVALUATORS.items() if fields(options))

    @property
    def requested(self) -> tuple[str, ...]:
        """Evaluators that their options alone have run."""
        sections = {name: getattr(self, name) for name, _ in self.added_by()}
        return tuple(name for name, section in sections.items() if section.is_requested)

    def on(self, records: Mapping[str, int]) -> Self:
        """Return the options with splits, which a store chooses if they are empty.

        Args:
            records: Number of records of each split of the store.
        """
        if self.splits:
            return self
        known = [split for split in TEST_SPLITS if records.get(split)]
        return replace(self, splits=tuple(known[:1]) or ("test",))

    def without_requests(self) -> EvaluateOptions:
        """Return the options without those that have evaluators run, also on untrained networks."""
        defaults = {name: cls() for name, cls in self.added_by() if name in self.requested}
        return replace(self, added=self.added | defaults, random_networks=0)

    def of(self, evaluator: type[E]) -> E:
        """Return the section of an evaluator."""
        section: E = getattr(self, evaluator.section.rpartition(".")[2])
        return section

    def _check_together(self) -> None:
        require(
            not isinstance(self.threshold, float) or 0 < self.threshold < 1,
            f"evaluate.threshold={self.threshold} must be a probability between 0 and 1, or the name of a split",
        )
        for name, groups in self.group_sets.items():
            require(
                name.isidentifier() and len(groups) > 0 and len(set(groups)) == len(groups),
                f"evaluate.group_sets must map a name (an identifier) to groups, each listed once, got "
                f"{name}: {list(groups)}",
            )
