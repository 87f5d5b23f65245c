"""Fidelity of a student to its teacher for each superfeature: mean KL(q_m teacher || q_m student) (KED).

q_m = softmax(z_m) is the prediction of superfeature m. The teacher's predictions are read from its stored pass.
Shape letters: B batch, M superfeatures of the level that is compared, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.errors import ConfigError
from permafrost.evaluation.context import EvaluationContext
from permafrost.evaluation.evaluator import LESS, PER_CENT, Evaluator, Page, Quantity
from permafrost.loading.dataset import iter_batches
from permafrost.loading.geometry import decode_intermediates, view_images
from permafrost.loading.transfer import iter_on_device
from permafrost_papers.ked.options import OUTPUT
from permafrost_papers.ked.partition import (
    coarsen,
    hierarchy_of,
    pass_hierarchy,
    require_same_level,
)
from permafrost_papers.ked.subnets import LOGITS, AdditiveClassifier


def fidelity_sums(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum KL divergences in nats, and records on which a superfeature of both predicts the same class: f64 [2, M].

    Args:
        teacher: Superfeature logits [B, M, K], raw or class-centered.
        student: [B, M, K], raw or class-centered.
    """
    log_p, log_q = (F.log_softmax(logits.double(), dim=2) for logits in (teacher, student))
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=2)
    same = teacher.argmax(dim=2) == student.argmax(dim=2)
    return torch.stack([kl, same.double()]).sum(dim=1)


def check_superfeatures(context: EvaluationContext) -> None:
    """Raise ConfigError unless student and teacher pass have superfeatures in common."""
    _levels(context)


def evaluate_superfeatures(context: EvaluationContext) -> dict[str, Any]:
    """Compare superfeatures at the finest level that both networks have.

    Returns:
        Number of superfeatures, means of kl and agreement over records and superfeatures, and kl by superfeature.
    """
    number, of_student, of_teacher = _levels(context)
    dataset = context.open_rows(context.dataset.rows, context.dataset.passes[:1], OUTPUT)
    total = torch.zeros(2, number, dtype=torch.float64)
    model = context.model
    for batch in iter_on_device(iter_batches(dataset, context.options.batch_size), model.device):
        stored = decode_intermediates(batch.targets[0])[OUTPUT]
        teacher_logits = coarsen(stored.cpu(), of_teacher, number)
        with torch.no_grad():
            output = model.network(view_images(batch, model.input_size))
        student_logits = coarsen(output.extras[LOGITS], of_student, number)
        total += fidelity_sums(teacher_logits, student_logits.cpu())
    kl, agreement = total / len(dataset)
    return {
        "number": number,
        "kl": float(kl.mean()),
        "agreement": float(agreement.mean()),
        "kl_by_superfeature": {str(number): float(value) for number, value in enumerate(kl)},
    }


def _levels(context: EvaluationContext) -> tuple[int, Tensor, Tensor]:
    """Number of compared superfeatures, and the one to which each of the student's and the teacher's belongs."""
    network = context.model.network
    if not isinstance(network, AdditiveClassifier):
        raise ConfigError(
            f"evaluators=superfeatures needs a network with superfeatures, but {type(network.network).__name__} "
            "has none; it evaluates students of student=additive"
        )
    passes = context.dataset.passes
    teacher = pass_hierarchy(passes[0]) if passes else None
    if teacher is None:
        raise ConfigError(
            "evaluators=superfeatures needs a teacher pass with superfeatures; run permafrost precompute "
            "teacher=additive annotate.outputs=[logits,superfeature_logits], and name its pass with store.teacher="
        )
    student = hierarchy_of(network.partition)
    number = min(len(student), len(teacher))
    require_same_level(student, teacher, number, passes[0].name)
    return number, student[number - 1].group_of_finest, teacher[number - 1].group_of_finest


EVALUATOR = Evaluator(
    evaluate_superfeatures,
    check_superfeatures,
    Page(
        "Superfeatures",
        "Fidelity of each superfeature",
        "Mean KL of each superfeature's prediction to the teacher's, in nats, and how often both predict the same "
        "class.",
        (
            Quantity(
                "kl",
                "KL, mean over superfeatures",
                "Divergence from the teacher's prediction by each superfeature, in nats; 0 is equality.",
                LESS,
            ),
            Quantity(
                "agreement",
                "Agreement, mean over superfeatures",
                "Fraction of records for which a superfeature has the same prediction in both networks.",
                PER_CENT,
            ),
            Quantity(
                "kl_by_superfeature",
                "KL by superfeature",
                "The same divergence for each superfeature, in nats.",
                LESS,
                "bar",
                is_main=False,
            ),
        ),
    ),
)
