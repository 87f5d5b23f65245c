"""Distances of logits as functions of tensors: the divergence over classes (KD), of each class (MLD), and others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import Logits, TopLogits, require_all_logits
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


def mld_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute tau * KL(teacher || student) of Bernoulli variables, summed over classes, averaged over the batch.

    With a = teacher_logits / tau, b = student_logits / tau and p = sigmoid(a), the divergence of one class is
    p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (log sigmoid(-a) - log sigmoid(-b)). It is exactly 0 for equal
    logits and finite for any logits, and its gradient sigmoid(b) - p does not saturate while the two differ.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw.
        tau: Temperature > 0; the factor is tau as in the paper, not tau^2 as for a softmax.
    """
    student, teacher = student_logits / tau, teacher_logits.detach() / tau
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return tau * (yes + no).sum(dim=1).mean()


def kd_loss(student_logits: Tensor, teacher_logits: Logits, tau: float) -> Tensor:
    """Compute tau^2 * KL(teacher || student), summed over classes and averaged over the batch.

    The paper uses the cross-entropy, which differs by tau^2 * entropy(teacher) and has the same gradient. This form
    is exactly 0 for equal logits.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw; of a pass with annotate.logits=topk the largest ones, whose divergence is
            that of `top_logits_divergence`.
        tau: Temperature > 0; the factor tau^2 makes the gradient's scale independent of it.

    Raises:
        ConfigError: If only the largest logits are stored, and not for this temperature.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> kd_loss(logits, logits, tau=4.0).item(), kd_loss(logits, -logits, tau=4.0).item() > 0
    (0.0, True)
    """
    if isinstance(teacher_logits, TopLogits):
        return tau**2 * top_logits_divergence(student_logits, teacher_logits, tau).mean()
    student_log_probs = F.log_softmax(student_logits / tau, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach() / tau, dim=1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return tau**2 * kl


def softmax_mse_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Compute tau^2 * mean squared difference of the softened probabilities, over records and classes.

    This is the logit term of UniCAM's released code. Near uniform probabilities, as at tau = 20, its gradient is about
    K^2 / 2 times smaller than that of `kd_loss` for K classes.

    Args:
        student_logits: [B, K]. Gradients flow here.
        teacher_logits: [B, K], constant, raw.
        tau: Temperature > 0.
    """
    student = F.softmax(student_logits / tau, dim=1)
    teacher = F.softmax(teacher_logits.detach() / tau, dim=1)
    return tau**2 * F.mse_loss(student, teacher)


LOGIT_LOSSES = {"softmax_mse": softmax_mse_loss, "mld": mld_loss}
"""Losses selected by `method.logits` besides `kd_loss`: (student, all of the teacher's logits, tau) -> the term kd."""
