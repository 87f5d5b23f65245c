"""Distances of logits as functions of tensors: the divergence over classes (KD), of each class (MLD), and others.

They are computed in float32 or wider from what tells two distributions apart and not from the distributions, which are
equal to the last bit at a high temperature. With d = (teacher - student) / tau, the teacher's distribution p and
c = d - E_p d, the divergence is

    KL(p || q) = log E_p exp(-c) = log(1 + E_p g(c)),    g(c) = exp(-c) - 1 + c >= 0,

whose terms are all of one sign. For high temperatures tau^2 KL is half the variance of teacher - student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import (
    AnyLogits,
    Logits,
    MixedLogits,
    TopLogits,
    require_all_logits,
)
from permafrost.core.errors import ConfigError, require
from permafrost.core.label_forms import IndependentLogits
from permafrost.losses.shapes import require_same_shape
from permafrost.models.classifier import to_float32

_FARTHEST = 60.0
"""Largest -c whose exponential is computed; beyond it, logarithms of probabilities are compared."""
_SERIES = {torch.float32: 3e-3, torch.float64: 1e-2}
"""Maximum |c| for computing g as a series, by dtype."""


def _excess(c: Tensor, grown: Tensor) -> Tensor:
    """Compute g(c) = exp(-c) - 1 + c with its full relative precision, given grown = exp(-c) - 1."""
    series = c / -3
    if c.dtype == torch.float64:
        series = c / -3 * (1 - c / 4 * (1 - c / 5 * (1 - c / 6)))
    series = series.add_(1).mul_(c).mul_(c).div_(2)
    return torch.where(c.abs() < _SERIES[c.dtype], series, grown + c)


def _soften(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the parts of a comparison [..., K] without a graph, for tensors in float32 or float64.

    Returns:
        log p, exp(-c) - 1, E_p g(c) [..., 1], and whether a row is near enough for these, bool [..., 1].
    """
    log_p = F.log_softmax(teacher / tau, dim=-1)
    p = log_p.exp()
    # Without what all logits of a row have in common, which would round their differences.
    c = teacher - teacher.amax(dim=-1, keepdim=True)
    c = c.sub_(student - student.amax(dim=-1, keepdim=True)).div_(tau)
    c -= (p * c).sum(dim=-1, keepdim=True)
    # A class that cannot be makes nan of a row, which is not near.
    is_near = (c > -_FARTHEST).all(dim=-1, keepdim=True)
    c = torch.where(is_near, c, 0.0)
    grown = torch.expm1(-c)
    return log_p, grown, (p * _excess(c, grown)).sum(dim=-1, keepdim=True), is_near


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) over the last axis, with the gradient (q - p) / tau in closed form."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        log_p, grown, excess, is_near = _soften(student, teacher, tau)
        p = log_p.exp()
        divergences = torch.log1p(excess)
        # q = p exp(-c) / E_p exp(-c), and E_p exp(-c) = 1 + E_p g(c)
        difference = grown.sub_(excess).mul_(p).div_(1 + excess)
        log_q = F.log_softmax(student / tau, dim=-1)
        far = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=-1, keepdim=True)
        divergences = torch.where(is_near, divergences, far)
        difference = torch.where(is_near, difference, log_q.exp_().sub_(p))
        ctx.save_for_backward(student, teacher, difference)
        ctx.tau = tau
        return divergences.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, difference = ctx.saved_tensors
        if torch.is_grad_enabled():  # of a second derivative, which follows the student's logits
            difference = F.softmax(student / ctx.tau, dim=-1) - F.softmax(teacher / ctx.tau, dim=-1)
        return (gradient / ctx.tau).unsqueeze(-1) * difference, None, None


class _Softened(torch.autograd.Function):
    """q - p over the last axis, with the gradient of a softmax."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> Tensor:
        log_p, grown, excess, is_near = _soften(student, teacher, tau)
        p, q = log_p.exp(), F.softmax(student / tau, dim=-1)
        difference = grown.sub_(excess).mul_(p).div_(1 + excess)
        difference = torch.where(is_near, difference, q - p)
        ctx.save_for_backward(student)
        ctx.tau = tau
        return difference

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (student,) = ctx.saved_tensors
        q = F.softmax(student / ctx.tau, dim=-1)
        along = (gradient * q).sum(dim=-1, keepdim=True)
        return (gradient - along) * q / ctx.tau, None, None


def divergence(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute KL(teacher || student) of the softened distributions over the last axis, float32 or wider.

    Args:
        student_logits: [..., K]. Gradients flow here.
        teacher_logits: [..., K], constant; -inf for a class that cannot be.
        tau: Temperature > 0.
    """
    student, teacher = to_float32(student_logits), to_float32(teacher_logits.detach())
    result: Tensor = _Divergence.apply(student, teacher, tau)
    return result


def outcome_log_probs(logits: Logits, reference: Logits, tau: float) -> Tensor:
    """Compute log probabilities of the outcomes "class c" for the k classes of `reference`, and "any other class".

    Args:
        logits: [B, K], or `reference` itself.
        reference: The largest logits, or those of all classes, which leave no other class.
        tau: Temperature > 0.

    Returns:
        [B, k + 1], or [B, K] if k = K.

    Raises:
        ConfigError: If the sum over the other classes is not stored at this temperature.
    """
    if not isinstance(reference, TopLogits):
        return F.log_softmax(require_all_logits(logits, "this comparison") / tau, dim=1)
    if tau not in reference.temperatures:
        known, more = (
            ",".join(f"{temperature:g}" for temperature in temperatures)
            for temperatures in (reference.temperatures, sorted({*reference.temperatures, tau}))
        )
        raise ConfigError(
            f"tau={tau:g}: the sum over the classes that are not stored is known at {known} only; choose one of these, "
            f"or make a pass with annotate.temperatures=[{more}]"
        )
    has_rest = reference.classes.shape[1] < reference.num_classes
    if isinstance(logits, TopLogits):
        place = reference.temperatures.index(tau)
        rest = [reference.rest[:, place : place + 1]] if has_rest else []
        return torch.cat([reference.values / tau, *rest], dim=1).log_softmax(dim=1)
    each = F.log_softmax(logits / tau, dim=1)
    outcomes = each.gather(1, reference.classes)
    if not has_rest:
        return outcomes
    others = each.scatter(1, reference.classes, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([outcomes, others], dim=1)


def top_logits_divergence(student_logits: Tensor, teacher: TopLogits, tau: float) -> Tensor:
    """Compute KL(teacher || student) of the outcomes that the teacher's pass stores, [B].

    It is the divergence over all classes if all are stored, and otherwise a lower bound of it, because merging
    outcomes cannot raise a divergence (log-sum inequality). How the student divides the rest is left open.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher: Largest logits of the teacher, constant.
        tau: Temperature > 0, one of those of the pass.

    Raises:
        ConfigError: If the sum over the other classes is not stored at this temperature, or the student has another
            number of records or classes.
    """
    expected = (len(teacher), teacher.num_classes)
    require(
        student_logits.shape == expected,
        f"the student's logits are {[*student_logits.shape]}, and those of the pass are {[*expected]}",
    )
    # In float64, so that the sums of what differs little are not those of rounding.
    student = outcome_log_probs(student_logits.double(), teacher, tau)
    wide = replace(teacher, values=teacher.values.double(), rest=teacher.rest.double())
    teacher_outcomes = outcome_log_probs(wide, wide, tau)
    return divergence(student, teacher_outcomes, 1.0).to(to_float32(student_logits).dtype)


def mean_over_records(distance: Callable[[Logits], Tensor], teacher_logits: AnyLogits) -> Tensor:
    """Average a distance from the teacher's logits over records. That of a mixture is the mean by both shares.

    For a divergence from all classes, lambda KL(a || s) + (1 - lambda) KL(b || s) = KL(m || s) + c with the mixture
    m = lambda a + (1 - lambda) b of the distributions and a constant c, so the gradient is that of the mixture.

    Args:
        distance: Function from logits of the teacher to distances [B].
        teacher_logits: Logits of images, or those of both records of mixtures.
    """
    if isinstance(teacher_logits, MixedLogits):
        first, second = distance(teacher_logits.first), distance(teacher_logits.second)
        return torch.lerp(second, first, teacher_logits.shares.to(first)).mean()
    return distance(teacher_logits).mean()


def mld_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float = 1.0) -> Tensor:
    """Compute tau * KL(teacher || student) of Bernoulli variables, summed over classes, averaged over the batch.

    With a = teacher_logits / tau, b = student_logits / tau and p = sigmoid(a), the divergence of one class is
    p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (log sigmoid(-a) - log sigmoid(-b)). It is exactly 0 for equal
    logits and finite for any logits, and its gradient sigmoid(b) - p does not saturate while the two differ.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw, or those of mixtures.
        tau: Temperature > 0; the factor is tau as in the paper, not tau^2 as for a softmax.
    """
    require(tau > 0, f"mld_loss needs a temperature tau > 0, got {tau}")

    def distance(logits: Logits) -> Tensor:
        every = require_all_logits(logits, "method.logits=mld").as_subclass(torch.Tensor)
        require_same_shape("mld_loss", student_logits, every, 2)
        student, teacher = (
            torch.stack([logits, torch.zeros_like(logits)], dim=2)
            for logits in (student_logits, every)
        )
        return divergence(student, teacher, tau).sum(dim=1)

    return tau * mean_over_records(distance, teacher_logits)


def kd_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float = 1.0) -> Tensor:
    """Compute tau^2 * KL(teacher || student), summed over classes and averaged over the batch.

    The paper uses the cross-entropy, which differs by tau^2 * entropy(teacher) and has the same gradient. This form
    is exactly 0 for equal logits.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw; of a pass with annotate.logits=topk the largest ones, whose divergence is
            that of `top_logits_divergence`; those of both records of mixtures (`mean_over_records`).
        tau: Temperature > 0; the factor tau^2 makes the gradient's scale independent of it.

    Raises:
        ConfigError: If the shapes differ, if only the largest logits are stored, and not for this temperature, or if
            the teacher's logits are those of a RecordLoader whose records have many labels.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> kd_loss(logits, logits, tau=4.0).item(), kd_loss(logits, -logits, tau=4.0).item() > 0
    (0.0, True)
    """
    require(tau > 0, f"kd_loss needs a temperature tau > 0, got {tau}")

    def distance(logits: Logits) -> Tensor:
        require(
            not isinstance(logits, IndependentLogits),
            "kd_loss compares the softmax over classes, but records of this store have many labels, each of which is a "
            "prediction of its own; use permafrost.mld_loss",
        )
        if isinstance(logits, TopLogits):
            return top_logits_divergence(student_logits, logits, tau)
        require_same_shape("kd_loss", student_logits, logits, 2)
        return divergence(student_logits, logits, tau)

    return tau**2 * mean_over_records(distance, teacher_logits)


def softmax_mse_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float) -> Tensor:
    """Compute tau^2 * mean squared difference of the softened probabilities, over records and classes.

    This is the logit term of UniCAM's released code. Near uniform probabilities, as at tau = 20, its gradient is about
    K^2 / 2 times smaller than that of `kd_loss` for K classes.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw, or those of mixtures.
        tau: Temperature > 0.
    """
    require(tau > 0, f"softmax_mse_loss needs a temperature tau > 0, got {tau}")
    student = to_float32(student_logits)

    def distance(logits: Logits) -> Tensor:
        every = require_all_logits(logits, "method.logits=softmax_mse").detach()
        require_same_shape("softmax_mse_loss", student_logits, every, 2)
        difference: Tensor = _Softened.apply(student, to_float32(every), tau)
        return difference.square().mean(dim=1)

    return tau**2 * mean_over_records(distance, teacher_logits)


_LEAST_PULL = 1e-3
"""Minimum gradient of a record's term, relative to tau = 1, for the term to teach anything."""


def describe_flat_temperature(loss: str, logits: AnyLogits, tau: float) -> str:
    """Say that a term is nearly constant at a temperature, empty if it is not.

    Args:
        loss: Name of the loss in LOGIT_LOSSES.
        logits: Logits of a teacher for some records.
        tau: Temperature > 0.
    """
    first = logits.first if isinstance(logits, MixedLogits) else logits
    if isinstance(first, TopLogits):
        return ""  # the temperatures are those of the pass
    pulls = []
    for temperature in (tau, 1.0):
        with torch.enable_grad():
            student = torch.zeros_like(first, requires_grad=True)
            value = LOGIT_LOSSES[loss](student, first, temperature)
            (gradient,) = torch.autograd.grad(value, student)
        pulls.append(float(gradient.abs().sum(dim=1).max()))
    share = pulls[0] / pulls[1] if pulls[1] else 1.0
    if not share < _LEAST_PULL:
        return ""
    return (
        f"method.tau={tau:g}: the term kd is nearly constant at this temperature, with {share:.1g} of its gradient at "
        "tau=1, so the student learns next to nothing from it; choose a temperature closer to the spread of the "
        "teacher's logits"
    )


LOGIT_LOSSES: dict[str, Callable[[Tensor, AnyLogits, float], Tensor]] = {
    "softmax": kd_loss,
    "softmax_mse": softmax_mse_loss,
    "mld": mld_loss,
}
"""Losses selected by `method.logits`: (student, teacher's logits, tau) -> the term kd. All but softmax need the logits
of all classes."""
