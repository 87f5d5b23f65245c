"""The training job of `distill`: resolves its options to passes, dataset, loss and transforms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.methods import KEDConfig, SoftTargetsConfig
from pipeline.config.models import (
    AdditiveModelConfig,
    ModelConfig,
    NoModelConfig,
    is_published,
)
from pipeline.core.errors import ConfigError, require
from pipeline.core.files import sha256_file, sha256_json
from pipeline.store.file_entry import StoreMismatchError
from pipeline.store.reader import Store, TeacherPass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pipeline.config.distillation import DistillConfig
    from pipeline.config.store import JpegDecoder
    from pipeline.config.training import TrainerOptions
    from pipeline.core.distributed import DistributedContext
    from pipeline.losses.base import DistillationLoss, Needs
    from pipeline.models.classifier import Classifier
    from pipeline.models.saved import TrainedModel
    from pipeline.training.epoch_selection import EpochSelection
    from pipeline.training.run import TrainingSpec
    from pipeline.training.superfeature_targets import SuperfeatureLevel
    from pipeline.training.transforms import BatchTransform

_OF_LOGITS = ("accuracy", "f1", "worst_group_accuracy", "agreement", "kl_to_teacher")
"""Metrics for which no map is computed."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The TrainingJob of one student."""

    config: DistillConfig
    folder: Path

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
        from pipeline.loading.dataset import StoreDataset
        from pipeline.loading.selection import select_training_rows
        from pipeline.losses.build import build_loss
        from pipeline.models.explainers.classes import resolve_explainer
        from pipeline.models.explainers.explain import DEFAULT_EXPLAINER
        from pipeline.training.run import TrainingSpec, decode_threads_of

        config = self.config
        store = Store(Path(config.store.path))
        passes = open_passes(config, store)
        rows = select_training_rows(store.index, config.split, config.subset)
        loss = build_loss(config.method)
        if passes:
            _check_passes(config, passes, needs=loss.needs)
        num_classes = passes[0].num_classes if passes else len(store.manifest.classes)
        explainer = passes[0].explainer if passes else None
        live = live_teacher(config)
        live_explainer = config.explainer
        if live is not None:
            num_classes = live.classes or num_classes
            live_explainer = resolve_explainer(config.explainer, store, num_classes)
            explainer = live_explainer.kind
        level, transforms = _compare_superfeatures(config, loss, passes, num_classes)
        return TrainingSpec(
            dataset=StoreDataset(
                store,
                rows,
                passes,
                num_classes=num_classes,
                payload=loss.needs.payload,
                decode_threads=decode_threads_of(config.trainer, distributed),
                jpeg_decoder=_jpeg_decoder(config, passes),
            ),
            model=config.student,
            num_classes=num_classes,
            loss=loss,
            augment=config.augment,
            optimizer=config.optimizer,
            trainer=config.trainer,
            seed=config.seed,
            explainer=explainer or DEFAULT_EXPLAINER,
            teacher_weights=_teacher_weights(config),
            replays=config.mode == "replay",
            views_per_step=config.views.per_step,
            live_teacher=live,
            live_explainer=live_explainer,
            superfeatures=level,
            transforms=transforms,
            epoch_selection=_epoch_selection(config, self.folder, store, passes, num_classes),
        )

    def describe(self, plan: TrainingSpec) -> TrainedModel:
        """Return the content of model.json for the result."""
        from pipeline.models.saved import TrainedModel

        return TrainedModel(
            config=self.config.student,
            num_classes=plan.num_classes,
            classes=plan.class_names,
            input_size=plan.input_size,
            teachers=tuple(_evaluation_pass(plan, teacher).name for teacher in plan.dataset.passes),
            split=self.config.split,
            subset=self.config.subset,
            jpeg_decoder=plan.dataset.jpeg_decoder,
        )


def _epoch_selection(
    config: DistillConfig,
    folder: Path,
    store: Store,
    passes: Sequence[TeacherPass],
    num_classes: int,
) -> EpochSelection | None:
    """Return the selection of select_epoch, None if it is null. Raises ConfigError if the split does not exist."""
    if config.select_epoch is None:
        return None
    from pipeline.config.evaluation import EvaluateOptions
    from pipeline.evaluation.forward import EvaluatedModel, open_split, predict_records
    from pipeline.evaluation.predictions import metrics_of
    from pipeline.loading.decode_threads import resolve_decode_threads
    from pipeline.models.saved import TrainedModel
    from pipeline.training.epoch_selection import EpochSelection

    split, _, metric = config.select_epoch.partition(".")
    size = store.size if config.augment.size is None else (config.augment.size,) * 2
    dataset = open_split(
        store,
        _compared_passes(config, store, passes, num_classes),
        split,
        TrainedModel(
            config=config.student,
            num_classes=num_classes,
            input_size=size,
            split=config.split,
            subset=config.subset,
        ),
        resolve_decode_threads(config.trainer.decode_threads),
        _jpeg_decoder(config, passes),
    )
    options = EvaluateOptions()

    def evaluate(model: Classifier) -> dict[str, Any]:
        was_training = model.training
        subject = EvaluatedModel(network=model.eval(), input_size=size)
        found = predict_records(subject, dataset, options, localize=metric not in _OF_LOGITS)
        model.train(was_training)
        return metrics_of(found, options.group_sets)

    return EpochSelection(folder, config.select_epoch, evaluate)


def _compared_passes(
    config: DistillConfig, store: Store, passes: Sequence[TeacherPass], num_classes: int
) -> list[TeacherPass]:
    """Return the canonical passes that the student is compared with, as its evaluation does.

    A student without stored targets (labels, or a live teacher) is compared with the passes of store.teacher, or with
    the only one of the store.
    """
    if config.mode == "replay":
        return [store.canonical_of(teacher) for teacher in passes]
    if passes or not (config.store.teacher or len(store.pass_folders()) == 1):
        return list(passes)
    found = store.open_passes(config.store.teacher)
    return [teacher for teacher in found if teacher.num_classes == num_classes]


def fingerprint_inputs(
    config: DistillConfig, store: Store, passes: list[TeacherPass]
) -> dict[str, str]:
    """Fingerprints of all inputs of a student in addition to its config."""
    inputs = {"store": store.manifest.fingerprint}
    inputs |= {f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in passes}
    if (live := live_teacher(config)) is not None:
        from pipeline.models.fingerprint import describe_teacher

        inputs["live teacher"] = sha256_json(describe_teacher(live, len(store.manifest.classes)))
    if isinstance(config.student, AdditiveModelConfig) and config.student.partition is not None:
        from pipeline.models.additive.partition import build_partition

        inputs["student.partition"] = build_partition(config.student).sha256
    weights = config.student.weights
    if weights is not None and is_published(weights):
        inputs["student.weights"] = weights  # the exact name identifies published weights
    elif weights is not None:
        require(
            Path(weights).is_file(), f"student.weights={weights} does not exist; correct the path"
        )
        inputs["student.weights"] = sha256_file(Path(weights))
    return inputs


def open_passes(config: DistillConfig, store: Store) -> list[TeacherPass]:
    """Open the passes to train on: none for methods without a teacher and for a live teacher."""
    if not config.method.needs_teacher or config.mode == "live":
        return []
    if config.mode == "replay":
        return _open_replayed(config, store)
    return store.open_passes(config.store.teacher)


def _open_replayed(config: DistillConfig, store: Store) -> list[TeacherPass]:
    """Open the named passes of stored views, or the only one with `views.count` views if none is named."""
    names: tuple[str, ...] = config.store.teacher
    folders = store.pass_folders(stored_views=True)
    if not names and len(folders) > 1:
        passes = [store.open_pass(folder.name, stored_views=True) for folder in folders]
        names = tuple(p.name for p in passes if p.num_views == config.views.count)
        if len(names) != 1:
            held = ", ".join(f"{p.name} ({p.num_views} views)" for p in passes)
            raise StoreMismatchError(
                f"{store.path} contains {len(names)} passes with views.count={config.views.count} stored views; "
                f"choose one with views=random views.count= or store.teacher= from: {held}"
            )
    return store.open_passes(names, stored_views=True)


def live_teacher(config: DistillConfig) -> ModelConfig | None:
    """Return the network that runs in every step with mode=live, or None."""
    return None if isinstance(config.teacher, NoModelConfig) else config.teacher


def _check_passes(config: DistillConfig, passes: list[TeacherPass], needs: Needs) -> None:
    """Raise StoreMismatchError unless one student can be trained on all of the passes."""
    for teacher in passes:
        if needs.maps_in(0) and teacher.explainer is None:
            raise StoreMismatchError(
                f"{teacher.folder} holds no maps, but method={config.method.kind} needs them; "
                "run permafrost precompute with annotate.payloads=[logits,map]"
            )
        if needs.payload is not None and not teacher.fields_of(needs.payload):
            raise StoreMismatchError(
                f"{teacher.folder} holds no payload {needs.payload}, but method={config.method.kind} needs it; run "
                f"permafrost precompute with annotate.payloads=[logits,map,{needs.payload}] and name its pass with "
                "store.teacher=, or run the teacher in the loop with mode=live"
            )
        for what in ("num_classes", "explainer", "views", "jpeg_decoder"):
            if getattr(teacher, what) != getattr(passes[0], what):
                raise StoreMismatchError(
                    f"the teachers of one student differ in {what}: {passes[0].name} has "
                    f"{getattr(passes[0], what)}, {teacher.name} has {getattr(teacher, what)}; choose other passes"
                )
    asked = config.trainer.jpeg_decoder
    if asked not in (None, passes[0].jpeg_decoder):
        raise StoreMismatchError(
            f"trainer.jpeg_decoder={asked}, but the teacher of {passes[0].folder} received images decoded with "
            f"annotate.jpeg_decoder={passes[0].jpeg_decoder}, whose pixels differ slightly; set "
            f"trainer.jpeg_decoder=null, or run permafrost precompute with annotate.jpeg_decoder={asked}"
        )
    weights = _teacher_weights(config)
    if len(weights) not in (0, len(passes)):
        raise ConfigError(
            f"method.teacher_weights={list(weights)} must name one weight for each of the {len(passes)} "
            f"passes of store.teacher: {', '.join(teacher.name for teacher in passes)}"
        )


def _jpeg_decoder(config: DistillConfig, passes: Sequence[TeacherPass]) -> JpegDecoder:
    """Return the device that decodes JPEGs, that of the passes if there are any."""
    return passes[0].jpeg_decoder if passes else config.trainer.jpeg_decoder or "cpu"


def _compare_superfeatures(
    config: DistillConfig, loss: DistillationLoss, passes: list[TeacherPass], num_classes: int
) -> tuple[SuperfeatureLevel | None, tuple[BatchTransform, ...]]:
    """Return the level of superfeatures that `method.superfeatures` names, and the batch transforms for it.

    Raises ConfigError unless student and teachers share that level.
    """
    method = config.method
    from pipeline.training.transforms import Mixup

    if not isinstance(method, KEDConfig) or not method.needs_superfeatures:
        return None, (Mixup(),)
    from pipeline.losses.ked import KEDLoss
    from pipeline.models.additive.hierarchy import (
        hierarchy_of,
        pass_hierarchy,
        require_same_level,
    )
    from pipeline.models.additive.network import network_partition
    from pipeline.models.providers import build_model
    from pipeline.training.superfeature_targets import SuperfeatureLevel
    from pipeline.training.transforms import Chimeras

    partition = network_partition(build_model(config.student, num_classes, may_replace_head=True))
    student = hierarchy_of(partition)
    number = method.superfeatures or student.most
    teachers = {teacher.name: pass_hierarchy(teacher) for teacher in passes}
    in_input_mode = {teacher.name: _is_input_mode(teacher) for teacher in passes}
    if (live := live_teacher(config)) is not None:
        teachers[live.name] = hierarchy_of(network_partition(build_model(live, num_classes)))
        in_input_mode[live.name] = isinstance(live, AdditiveModelConfig) and live.is_input_mode
    coarsenings = []
    for name, hierarchy in teachers.items():
        assert hierarchy is not None  # passes without superfeature_logits have been rejected
        require_same_level(student, hierarchy, number, name)
        coarsenings.append(hierarchy.coarsening(number))
        require(
            method.chimera_fraction == 0 or in_input_mode[name],
            f"method.chimera_fraction={method.chimera_fraction} combines the teacher's superfeature logits of "
            f"different records, but those of {name} depend on the whole input; choose a teacher of name=mlp or conv, "
            "or set method.chimera_fraction=0",
        )
    if number < student.most:
        assert isinstance(loss, KEDLoss)
        loss.set_student_coarsening(student.coarsening(number))
    level = SuperfeatureLevel(number=number, coarsenings=tuple(coarsenings))
    if method.chimera_fraction == 0 or method.lambda_ked == 0:
        return level, (Mixup(),)
    chimeras = Chimeras(
        fraction=method.chimera_fraction,
        number=number,
        assignment=partition.assignment(number),
        grid=partition.grid,
    )
    return level, (chimeras, Mixup())


def _is_input_mode(teacher: TeacherPass) -> bool:
    architecture = teacher.manifest.teacher["architecture"]
    return bool(architecture["kind"] == "additive" and architecture["name"] != "trunk")


def _evaluation_pass(plan: TrainingSpec, teacher: TeacherPass) -> TeacherPass:
    """Return the pass that an evaluation compares a student of `teacher` with."""
    return plan.dataset.store.canonical_of(teacher) if plan.replays else teacher


def _teacher_weights(config: DistillConfig) -> tuple[float, ...]:
    method = config.method
    return method.teacher_weights if isinstance(method, SoftTargetsConfig) else ()
