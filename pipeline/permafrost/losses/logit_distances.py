"""Distances of logits as functions of tensors: the divergence over classes (KD), of each class (MLD), and others."""

from __future__ import annotations

from collections.abc import Callable

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
from permafrost.core.errors import ConfigError


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
        raise ConfigError(
            f"tau={tau:g}: the sum over the classes that are not stored is known at "
            f"{', '.join(f'{each:g}' for each in reference.temperatures)} only; choose one of these, or make a pass "
            f"with annotate.temperatures=[{','.join(f'{t:g}' for t in sorted({*reference.temperatures, tau}))}]"
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
        ConfigError: If the sum over the other classes is not stored at this temperature.
    """
    student = outcome_log_probs(student_logits, teacher, tau)
    teacher_outcomes = outcome_log_probs(teacher, teacher, tau)
    return F.kl_div(student, teacher_outcomes, reduction="none", log_target=True).sum(dim=1)


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


def mld_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float) -> Tensor:
    """Compute tau * KL(teacher || student) of Bernoulli variables, summed over classes, averaged over the batch.

    With a = teacher_logits / tau, b = student_logits / tau and p = sigmoid(a), the divergence of one class is
    p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (log sigmoid(-a) - log sigmoid(-b)). It is exactly 0 for equal
    logits and finite for any logits, and its gradient sigmoid(b) - p does not saturate while the two differ.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw, or those of mixtures.
        tau: Temperature > 0; the factor is tau as in the paper, not tau^2 as for a softmax.
    """
    student = student_logits / tau

    def distance(logits: Logits) -> Tensor:
        teacher = require_all_logits(logits, "method.logits=mld").detach() / tau
        yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
        no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
        return (yes + no).sum(dim=1)

    return tau * mean_over_records(distance, teacher_logits)


def kd_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float) -> Tensor:
    """Compute tau^2 * KL(teacher || student), summed over classes and averaged over the batch.

    The paper uses the cross-entropy, which differs by tau^2 * entropy(teacher) and has the same gradient. This form
    is exactly 0 for equal logits.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw; of a pass with annotate.logits=topk the largest ones, whose divergence is
            that of `top_logits_divergence`; those of both records of mixtures (`mean_over_records`).
        tau: Temperature > 0; the factor tau^2 makes the gradient's scale independent of it.

    Raises:
        ConfigError: If only the largest logits are stored, and not for this temperature.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> kd_loss(logits, logits, tau=4.0).item(), kd_loss(logits, -logits, tau=4.0).item() > 0
    (0.0, True)
    """

    def divergence(logits: Logits) -> Tensor:
        if isinstance(logits, TopLogits):
            return top_logits_divergence(student_logits, logits, tau)
        student = F.log_softmax(student_logits / tau, dim=1)
        teacher = F.log_softmax(logits.detach() / tau, dim=1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)

    return tau**2 * mean_over_records(divergence, teacher_logits)


def softmax_mse_loss(student_logits: Tensor, teacher_logits: AnyLogits, tau: float) -> Tensor:
    """Compute tau^2 * mean squared difference of the softened probabilities, over records and classes.

    This is the logit term of UniCAM's released code. Near uniform probabilities, as at tau = 20, its gradient is about
    K^2 / 2 times smaller than that of `kd_loss` for K classes.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw, or those of mixtures.
        tau: Temperature > 0.
    """
    student = F.softmax(student_logits / tau, dim=1)

    def distance(logits: Logits) -> Tensor:
        teacher = require_all_logits(logits, "method.logits=softmax_mse").detach()
        return (student - F.softmax(teacher / tau, dim=1)).square().mean(dim=1)

    return tau**2 * mean_over_records(distance, teacher_logits)


LOGIT_LOSSES = {"softmax": kd_loss, "softmax_mse": softmax_mse_loss, "mld": mld_loss}
"""Losses selected by `method.logits`: (student, teacher's logits, tau) -> the term kd. All but softmax need the logits
of all classes."""
