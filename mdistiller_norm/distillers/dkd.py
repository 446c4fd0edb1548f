"""DKD: the KL divergence of KD, split into a target-class and a non-target part.

Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), Eq. 6-7.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import TargetDistiller, register
from mdistiller_norm.distillers.temperature import soften
from mdistiller_norm.types import Softened


def split_target(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Split softened logits ``[B, C]`` into the target class and the others.

    Returns:
        The log odds of the target class, ``[B]``, and the log probabilities of the other classes among themselves,
        ``[B, C - 1]``.
    """
    rest = torch.arange(logits.shape[1] - 1, device=targets.device).expand(len(targets), -1)
    others = logits.gather(1, rest + (rest >= targets[:, None]).long())
    odds = logits.gather(1, targets[:, None]).squeeze(1) - others.logsumexp(1)
    return odds, others.log_softmax(1)


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two-class distributions given by their log odds, elementwise."""
    divergence = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return divergence + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def decoupled_divergence(
    softened: Softened, targets: Tensor, alpha: float, beta: float
) -> Tensor:
    """Average ``weight * (alpha * TCKD + beta * NCKD)`` of softened logits over the batch.

    The target logit is removed by index, and the two-class part is a log-sigmoid of ``z_target - logsumexp(z_rest)``:
    exact and finite for any finite logits.
    """
    odds_s, others_s = split_target(softened.student, targets)
    odds_t, others_t = split_target(softened.teacher, targets)
    nckd = (others_t.exp() * (others_t - others_s)).sum(1)
    return (softened.weight * (alpha * binary_divergence(odds_s, odds_t) + beta * nckd)).mean()


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)`` of logits divided by T, averaged over the batch (Eq. 7).

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class indices.
    """
    softened = soften(student_logits, teacher_logits, temperature)
    return decoupled_divergence(softened, targets, alpha, beta)


@register("DKD")
class DKD(TargetDistiller):
    """Decoupled knowledge distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20}
    meanings = {"ALPHA": "weight of the target part", "BETA": "weight of the non-target part"}
    loss = staticmethod(dkd_loss)
    arguments = {"alpha": "ALPHA", "beta": "BETA", "temperature": "T"}
