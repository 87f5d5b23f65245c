"""The losses of KED (arXiv 2310.02572): a student's, on the prediction of each superfeature, and a teacher's.

A student is compared with its teachers at one level of their hierarchies, to which their targets are coarsened. The
loss of a teacher depends only on the sum of the subnets' logits, so each subnet can specialize on its own features.

Shape letters: B batch, M superfeatures of the compared level, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.builder import build_config, to_plain_dict
from permafrost.config.distillation import DistillConfig
from permafrost.core.batches import AnyLabels, Targets, require_logits
from permafrost.core.errors import require
from permafrost.losses.base import DistillationLoss, Needs, StoredTeacher, StudentOutput, Term
from permafrost.losses.labels import LabelsLoss, label_term
from permafrost.losses.logit_distances import kd_loss
from permafrost.models.classifier import ModelOutput
from permafrost.models.providers import build_model
from permafrost.store.manifest import CANONICAL_VIEW
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.student_passes import live_teacher
from permafrost_papers.ked.additive_network import network_partition
from permafrost_papers.ked.chimeras import Chimeras
from permafrost_papers.ked.options import (
    HIDDEN_OUTPUT,
    OUTPUT,
    PARTITION_NAME,
    AdditiveModelConfig,
    KEDConfig,
    KEDTeachingConfig,
)
from permafrost_papers.ked.partition import (
    class_centered,
    coarsen,
    hierarchy_of,
    pass_hierarchy,
    require_same_level,
)
from permafrost_papers.ked.subnets import HIDDEN, LOGITS


def superfeature_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Average `kd_loss` over superfeatures: tau^2 / M * sum_m KL(teacher || student).

    Args:
        student_logits: [B, M, K]. Gradients flow here.
        teacher_logits: [B, M, K], constant, raw or class-centered.
        tau: Temperature > 0, separate from that of the predictions.
    """
    return kd_loss(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), tau)


def control_explanations(teacher_logits: Tensor, control: str) -> Tensor:
    """Perturb the teacher's superfeatures for a negative control.

    Args:
        teacher_logits: [B, M, K].
        control: "shuffled" uses those of the previous record in the batch, "noise" uses class-centered Gaussian noise
            with the standard deviation of the record; any other value changes nothing.
    """
    if control == "shuffled":
        return teacher_logits.roll(1, dims=0)
    if control == "noise":
        noise = class_centered(torch.randn_like(teacher_logits))
        scale = teacher_logits.std(dim=(1, 2), keepdim=True, correction=0)
        return noise * scale / noise.std(dim=(1, 2), keepdim=True, correction=0)
    return teacher_logits


def superfeature_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the field superfeature_logits [B, M, K], at the teacher's finest level, class-centered."""
    return {LOGITS: class_centered(output.extras[LOGITS].detach())}


def hint_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Return the fields superfeature_logits [B, M, K] and superfeature_hidden [B, M, width].

    Both are at the teacher's finest level.
    """
    return {**superfeature_fields(output), HIDDEN: output.extras[HIDDEN].detach()}


def coarsen_targets(targets: Targets, coarsening: Tensor) -> Targets:
    """Sum a teacher's superfeatures to the compared level.

    Args:
        targets: Targets with superfeature logits at the teacher's finest level.
        coarsening: i64 [finest M], the superfeature of the compared level for each of the teacher's.
    """
    coarse = coarsen(targets.intermediates[LOGITS], coarsening, int(coarsening.max()) + 1)
    return replace(targets, intermediates=targets.intermediates | {LOGITS: coarse})


class KEDLoss(DistillationLoss):
    """Loss w * ce + lambda_ked * ((1 - mu) * kd + mu * ked) + lambda_hint * hint, with the weights of KEDConfig.

    A term with weight 0 is not computed, and its inputs are not requested from the networks.
    """

    student_coarsening: Tensor | None
    """Superfeature of the compared level for each of the student's, i64 [M], None if it is the student's finest."""

    config: KEDConfig

    def __init__(self, config: KEDConfig) -> None:
        super().__init__(config)
        self.hint = nn.Identity()
        """Linear map from the student's hidden layers to the teacher's, created by `build`."""
        self.register_buffer("student_coarsening", None, persistent=False)
        self.teacher_coarsenings: list[Tensor] = []
        """Superfeature of the compared level for each of a teacher's finest ones, one i64 [finest M] per teacher."""

    def plan(
        self, config: DistillConfig, passes: Sequence[StoredTeacher], num_classes: int
    ) -> None:
        """Find the level that `method.superfeatures` names in the hierarchies of the student and of its teachers.

        Raises:
            ConfigError: If the networks do not have this level in common, or chimeras or hints do not fit the teachers.
        """
        if not (method := self.config).needs_superfeatures:
            return
        require(
            not self.has_hint or len(passes) <= 1,
            f"method.lambda_hint={method.lambda_hint} compares the hidden layers of one teacher, but store.teacher "
            f"names {len(passes)}; name one, or set method.lambda_hint=0",
        )
        partition = network_partition(
            build_model(config.student, num_classes, may_replace_head=True)
        )
        student = hierarchy_of(partition)
        number = method.superfeatures or len(student)
        stored = [teacher for teacher in passes if isinstance(teacher, TeacherPass)]
        teachers = {teacher.name: pass_hierarchy(teacher) for teacher in stored}
        architectures = {
            teacher.name: teacher.manifest.teacher["architecture"] for teacher in stored
        }
        in_input_mode = {
            name: architecture["kind"] == "additive" and architecture["name"] != "trunk"
            for name, architecture in architectures.items()
        }
        if (live := live_teacher(config)) is not None:
            teachers[live.name] = hierarchy_of(network_partition(build_model(live, num_classes)))
            in_input_mode[live.name] = isinstance(live, AdditiveModelConfig) and live.is_input_mode
        for name, hierarchy in teachers.items():
            assert hierarchy is not None  # passes without superfeature_logits have been rejected
            require_same_level(student, hierarchy, number, name)
            self.teacher_coarsenings.append(hierarchy[number - 1].group_of_finest)
            require(
                method.chimera_fraction == 0 or in_input_mode[name],
                f"method.chimera_fraction={method.chimera_fraction} combines the teacher's superfeature logits of "
                f"different records, but those of {name} depend on the whole input; choose a teacher of name=mlp or "
                "conv, or set method.chimera_fraction=0",
            )
        if number < len(student):
            self.student_coarsening = student[number - 1].group_of_finest
        if method.chimera_fraction > 0 and method.lambda_ked > 0:
            self.transforms = (
                Chimeras(
                    fraction=method.chimera_fraction,
                    number=number,
                    assignment=partition.assignment(number),
                    grid=partition.grid,
                ),
            )

    def convert_targets(self, targets: tuple[Targets, ...]) -> tuple[Targets, ...]:
        """Bring the superfeatures of every teacher to the level that is compared."""
        if not self.teacher_coarsenings:
            return targets
        return tuple(
            coarsen_targets(teacher_targets, coarsening)
            for teacher_targets, coarsening in zip(targets, self.teacher_coarsenings, strict=True)
        )

    @property
    def label_weight(self) -> float:
        """Weight w of ce."""
        return 1.0 if self.config.hard_weight == "one" else 1 - self.config.lambda_ked

    @property
    def has_hint(self) -> bool:
        """True if hidden layers are compared."""
        return self.config.lambda_hint > 0

    @property
    def needs(self) -> Needs:
        labels = self.label_weight > 0
        if not self.config.needs_superfeatures:
            return Needs(labels=labels)
        return Needs(
            labels=labels,
            target_fields=hint_fields if self.has_hint else superfeature_fields,
            outputs=(OUTPUT, HIDDEN_OUTPUT) if self.has_hint else (OUTPUT,),
        )

    def check_labels(self, *, many: bool) -> None:
        require(
            not many,
            "method=ked assumes one label per record, but records of this store have many labels; set method=kd "
            "method.logits=mld",
        )

    def build(self, student: StudentOutput, targets: Targets) -> None:
        if not self.has_hint:
            return
        hidden, target = student.output.extras[HIDDEN].shape, targets.intermediates[HIDDEN].shape
        level = targets.intermediates[LOGITS].shape[1]
        require(
            hidden[1] == target[1] == level,
            f"method.lambda_hint={self.config.lambda_hint} compares hidden layers, which cannot be coarsened, but "
            f"student, teacher and method.superfeatures have {hidden[1]}, {target[1]} and {level} superfeatures; "
            "make these numbers equal, or set method.lambda_hint=0",
        )
        self.hint = nn.Linear(hidden[2], target[2])  # type: ignore[assignment]

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        teacher_logits, tau = targets.logits, self.config.tau
        ked_weight, mu = self.config.lambda_ked, self.config.mu
        yield label_term(student.logits, labels, self.label_weight)
        yield Term(
            "kd",
            ked_weight * (1 - mu),
            lambda: kd_loss(student.logits, require_logits(teacher_logits), tau),
        )
        yield Term("ked", ked_weight * mu, lambda: self._compare(student, targets))
        yield Term(
            "hint",
            self.config.lambda_hint,
            lambda: F.mse_loss(
                self.hint(student.output.extras[HIDDEN]), targets.intermediates[HIDDEN]
            ),
        )

    def _compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        teacher = control_explanations(
            targets.intermediates[LOGITS], self.config.superfeature_control
        )
        student_logits = student.output.extras[LOGITS]
        if self.student_coarsening is not None:
            student_logits = coarsen(student_logits, self.student_coarsening, teacher.shape[1])
        return superfeature_loss(student_logits, teacher, self.config.tau_superfeatures)


_SHARED = (
    *("name", "superfeatures", "grid", "trunk", "trunk_kind", "trunk_features", "stem_stride"),
    "columns",
)
"""Options of a network that its superfeatures depend on."""


def suggest_student(store: Store, teacher: TeacherPass) -> list[str]:
    """Return arguments of `distill` for a student with the superfeatures of a pass, [] if none can have them.

    The partition is the one that the run of the teacher has found, or contiguous. The student has the default width.
    """
    hierarchy, described = pass_hierarchy(teacher), teacher.manifest.teacher
    classes = store.manifest.classes_of(teacher.num_classes)
    has_labels = bool(classes) and store.index.most_labels()
    if hierarchy is None or not has_labels or store.manifest.multi_label:
        return []
    options = {name: described["architecture"][name] for name in _SHARED}
    options["input_size"] = described["preprocessing"].get("input_size")
    folder = Path(teacher.manifest.made_with.get("weights", "")).parent
    options["partition"] = str(folder) if (folder / PARTITION_NAME).is_file() else None
    student = build_config(AdditiveModelConfig, options)
    partition = network_partition(build_model(student, classes, may_replace_head=True))
    if hierarchy_of(partition)[-1] != hierarchy[-1]:
        return []
    defaults = to_plain_dict(AdditiveModelConfig()) | {"columns": student.columns}  # the store's
    words = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
    return [
        "student=additive",
        *(f"student.{word}" for word in words),
        *(["augment=none"] if teacher.views["sampler"] == CANONICAL_VIEW else []),
    ]


class ExplainingTeacherLoss(LabelsLoss):
    """Loss ce + lambda_kd * kd, where kd compares with the black box."""

    config: KEDTeachingConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, targets=self.config.lambda_kd > 0)

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield from super().terms(student, targets, labels)
        if self.needs.targets:
            teacher_logits, config = targets.logits, self.config
            yield Term(
                "kd",
                config.lambda_kd,
                lambda: kd_loss(student.logits, require_logits(teacher_logits), config.tau),
            )
