"""The training job of `distill`: resolves its options to passes, dataset, loss and transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from permafrost.config.models import is_published
from permafrost.core.digests import sha256_json
from permafrost.core.errors import require
from permafrost.models.fingerprint import describe_teacher, identify_weights
from permafrost.models.trained_weights import weights_file
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.student_passes import (
    check_passes,
    doubt_moved_features,
    explainer_of,
    live_teacher,
    open_passes,
    teacher_weights_of,
)

if TYPE_CHECKING:
    from permafrost.config.distillation import DistillConfig
    from permafrost.config.training import TrainerOptions
    from permafrost.core.distributed import DistributedContext
    from permafrost.models.saved import TrainedModel
    from permafrost.training.spec import TrainingSpec


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The TrainingJob of one student."""

    config: DistillConfig
    folder: Path

    @property
    def run(self) -> str:
        """Name of the run, or its address in a bucket."""
        return self.config.run

    def moved_to(self, folder: Path) -> Self:
        """Return the same job with the run's folder on another machine."""
        return replace(self, folder=folder)

    @property
    def trainer(self) -> TrainerOptions:
        """Trainer options, such as epochs and number of ranks."""
        return self.config.trainer

    def prepare(self, distributed: DistributedContext) -> None:
        """Do nothing, because the store of a student is complete."""

    def plan(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        """Build the specification of the training.

        Raises ConfigError or StoreMismatchError if the options do not fit the store.

        distributed  ranks that share the cores of this machine, None if this process trains alone
        """
        from permafrost.loading.dataset import StoreDataset
        from permafrost.loading.decode_threads import decode_threads_of
        from permafrost.loading.subset import select_training_rows
        from permafrost.losses.base import build_loss
        from permafrost.models.explanations import DEFAULT_EXPLAINER, resolve_explainer
        from permafrost.training.epoch_selection import plan_curve, select_epochs
        from permafrost.training.spec import TrainingSpec

        config = self.config
        store = Store(config.store.folder)
        passes = open_passes(config, store)
        rows = select_training_rows(store.index, config.split, config.subset)
        loss = build_loss(config.method)
        if passes:
            check_passes(config, passes, loss)
        # Without logits and labels the last layer is not trained, and has one output.
        num_classes = max(1, len(store.manifest.classes))
        with_logits = [teacher for teacher in passes if teacher.manifest.has_logits]
        if with_logits:
            num_classes = with_logits[0].num_classes
        explainer = explainer_of(passes, loss)
        live = live_teacher(config)
        live_explainer = config.explainer
        if live is not None:
            num_classes = live.classes or num_classes
            live_explainer = resolve_explainer(config.explainer, store, num_classes)
            explainer = live_explainer.kind
        loss.plan(config, passes, num_classes)
        return TrainingSpec(
            dataset=StoreDataset(
                store,
                rows,
                passes,
                num_classes=num_classes,
                payload=[loss.payloads_of(teacher.name) for teacher in passes],
                decode_threads=decode_threads_of(config.trainer, distributed),
            ),
            model=config.student,
            num_classes=num_classes,
            loss=loss,
            augment=config.augment,
            optimizer=config.optimizer,
            trainer=config.trainer,
            seed=config.seed,
            explainer=explainer or DEFAULT_EXPLAINER,
            teacher_weights=teacher_weights_of(config, passes),
            replays=config.mode == "replay",
            views_per_step=config.views.per_step,
            live_teacher=live,
            live_explainer=live_explainer,
            after_epoch=plan_curve(config, self.folder, store, passes, num_classes),
            epoch_selection=select_epochs(config, self.folder, store, passes, num_classes),
            doubt=doubt_moved_features(config, passes, loss),
        )

    def describe(self, plan: TrainingSpec) -> TrainedModel:
        """Return the content of model.json for the result."""
        from permafrost.models.saved import TrainedModel

        return TrainedModel(
            config=self.config.student,
            num_classes=plan.num_classes,
            classes=plan.class_names,
            input_size=plan.input_size,
            teachers=tuple(_evaluation_pass(plan, teacher).name for teacher in plan.dataset.passes),
            split=self.config.split,
            subset=self.config.subset,
        )


def fingerprint_inputs(
    config: DistillConfig, store: Store, passes: list[TeacherPass]
) -> dict[str, str]:
    """Fingerprints of all inputs of a student in addition to its config."""
    inputs = {"store": store.manifest.fingerprint}
    inputs |= {f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in passes}
    if config.mode != "replay" and config.augment.shifts_of_originals:
        from permafrost.loading.selected_records import SelectedRecords
        from permafrost.loading.subset import select_training_rows

        rows = select_training_rows(store.index, config.split, config.subset)
        shifts = SelectedRecords(store, rows).identify_shifts(config.augment)
        inputs |= {"shifts": shifts} if shifts is not None else {}
    if (live := live_teacher(config)) is not None:
        from permafrost.losses.base import build_loss

        described = describe_teacher(
            live, len(store.manifest.classes), reads_head=build_loss(config.method).needs.logits
        )
        inputs["live teacher"] = sha256_json(described)
    files = config.student.fingerprint_files()
    inputs |= {f"student.{option}": sha256 for option, sha256 in files.items()}
    weights = config.student.weights
    if weights is not None and is_published(weights):
        inputs["student.weights"] = weights  # the exact name identifies published weights
    elif weights is not None:
        path = weights_file(weights)
        require(path.is_file(), f"student.weights={weights} does not exist; correct the path")
        classes = len(store.manifest.classes)
        inputs["student.weights"] = identify_weights(config.student, classes)
    return inputs


def _evaluation_pass(plan: TrainingSpec, teacher: TeacherPass) -> TeacherPass:
    """Return the pass that an evaluation compares a student of `teacher` with."""
    return plan.dataset.store.canonical_of(teacher) if plan.replays else teacher
