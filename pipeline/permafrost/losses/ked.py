"""KED (arXiv 2310.02572): match the teacher's predictions for each superfeature.

Shape letters: B batch, M superfeatures of the compared level, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from permafrost.config.methods import KEDConfig
from permafrost.core.errors import ConfigError, require
from permafrost.core.records import Guidance, Targets
from permafrost.losses.base import DistillationLoss, Needs, StudentOutput, Term
from permafrost.losses.kd import kd_loss
from permafrost.losses.labels import label_term
from permafrost.models.additive.hierarchy import class_centered, coarsen
from permafrost.models.output import Intermediates, ModelOutput


def superfeature_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Average `kd_loss` over superfeatures: tau^2 / M * sum_m KL(teacher || student).

    student_logits  [B, M, K]  gradients flow here
    teacher_logits  [B, M, K]  constant, raw or class-centered
    tau             temperature > 0, separate from that of the predictions
    """
    return kd_loss(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), tau)


def control_explanations(teacher_logits: Tensor, control: str) -> Tensor:
    """Perturb the teacher's superfeatures [B, M, K] for a negative control.

    control  "shuffled" uses those of the previous record in the batch, "noise" uses class-centered Gaussian noise with
             the standard deviation of the record
    """
    if control == "shuffled":
        return teacher_logits.roll(1, dims=0)
    if control == "noise":
        noise = class_centered(torch.randn_like(teacher_logits))
        scale = teacher_logits.std(dim=(1, 2), keepdim=True, correction=0)
        return noise * scale / noise.std(dim=(1, 2), keepdim=True, correction=0)
    return teacher_logits


def superfeature_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Field superfeature_logits [B, M, K], at the teacher's finest level, class-centered."""
    assert output.superfeature_logits is not None
    return {"superfeature_logits": class_centered(output.superfeature_logits.detach())}


def hint_fields(output: ModelOutput) -> dict[str, Tensor]:
    """Fields superfeature_logits and superfeature_hidden [B, M, width], of which the latter is not stored."""
    assert output.superfeature_hidden is not None
    return {
        **superfeature_fields(output),
        "superfeature_hidden": output.superfeature_hidden.detach(),
    }


class KEDLoss(DistillationLoss):
    """Loss w * ce + lambda_ked * ((1 - mu) * kd + mu * ked) + lambda_hint * hint, with the weights of KEDConfig.

    A term with weight 0 is not computed, and its inputs are not requested from the networks.
    """

    student_coarsening: Tensor | None

    def __init__(self, config: KEDConfig) -> None:
        super().__init__()
        self.config = config
        self.hint = nn.Identity()
        """Linear map from the student's hidden layers to the teacher's, created by `build`."""
        self.register_buffer("student_coarsening", None, persistent=False)

    def set_student_coarsening(self, coarsening: Tensor) -> None:
        """Compare the student at a coarser level.

        coarsening  i64 [M of the student]: superfeature of the coarser level for each of the student's
        """
        self.student_coarsening = coarsening

    @property
    def label_weight(self) -> float:
        """Weight w of ce."""
        return 1.0 if self.config.hard_weight == "one" else 1 - self.config.lambda_ked

    @property
    def prediction_weight(self) -> float:
        """Weight of kd."""
        return self.config.lambda_ked * (1 - self.config.mu)

    @property
    def explanation_weight(self) -> float:
        """Weight of ked."""
        return self.config.lambda_ked * self.config.mu

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
            intermediates=Intermediates(superfeatures=True),
            target_fields=hint_fields if self.has_hint else superfeature_fields,
            payload="superfeature_logits",
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
        assert student.output.superfeature_hidden is not None
        own, taught = (
            student.output.superfeature_hidden.shape,
            targets.intermediates["superfeature_hidden"].shape,
        )
        level = targets.intermediates["superfeature_logits"].shape[1]
        if not own[1] == taught[1] == level:
            raise ConfigError(
                f"method.lambda_hint={self.config.lambda_hint} compares hidden layers, which cannot be coarsened, but "
                f"student, teacher and method.superfeatures have {own[1]}, {taught[1]} and {level} superfeatures; "
                "make these numbers equal, or set method.lambda_hint=0"
            )
        self.hint = nn.Linear(own[2], taught[2])  # type: ignore[assignment]

    def terms(
        self, student: StudentOutput, targets: Targets | Guidance | None, labels: Tensor
    ) -> Iterable[Term]:
        assert isinstance(targets, Targets)
        taught, tau = targets.logits, self.config.tau
        yield label_term(student.logits, labels, self.label_weight)
        yield Term("kd", self.prediction_weight, lambda: kd_loss(student.logits, taught, tau))
        yield Term("ked", self.explanation_weight, lambda: self._compare(student, targets))
        yield Term("hint", self.config.lambda_hint, lambda: self._hint_error(student, targets))

    def _hint_error(self, student: StudentOutput, targets: Targets) -> Tensor:
        hidden = student.output.superfeature_hidden
        assert hidden is not None
        return F.mse_loss(self.hint(hidden), targets.intermediates["superfeature_hidden"])

    def _compare(self, student: StudentOutput, targets: Targets) -> Tensor:
        assert student.output.superfeature_logits is not None
        teacher = control_explanations(
            targets.intermediates["superfeature_logits"], self.config.superfeature_control
        )
        own = student.output.superfeature_logits
        if self.student_coarsening is not None:
            own = coarsen(own, self.student_coarsening, teacher.shape[1])
        return superfeature_loss(own, teacher, self.config.tau_superfeatures)
