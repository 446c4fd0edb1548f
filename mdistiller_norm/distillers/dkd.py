"""DKD: KD's divergence taken apart into the target class against the rest, and the rest among themselves.

Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022), Eq. 6-7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, refuse_negative, register
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.types import Batch, Outputs, Softened


def split_target(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One class against all others, and the others among themselves, of softened logits.

    Args:
        logits: ``[B, C]``.
        targets: ``[B]``, int64: the class.

    Returns:
        The log odds of the class, ``[B]``, and the log probabilities of the others without it, ``[B, C - 1]``.
    """
    rest = torch.arange(logits.shape[1] - 1, device=targets.device).expand(len(targets), -1)
    others = logits.gather(1, rest + (rest >= targets[:, None]).long())
    return logits.gather(1, targets[:, None]).squeeze(1) - others.logsumexp(1), others.log_softmax(1)


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of two-class distributions given by their log odds, element by element."""
    divergence = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return divergence + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def decoupled_divergence(softened: Softened, targets: Tensor, alpha: float, beta: float) -> Tensor:
    """Mean over the batch of ``weight * (alpha * TCKD + beta * NCKD)`` of softened logits; a scalar.

    The target's logit is left out of the non-target part by index, and the two-class part is a log-sigmoid of
    ``z_target - logsumexp(z_rest)``: exact, and finite for any finite logits (the usual form takes the log of a
    probability that underflows, and masks the target by adding -1000). With two classes NCKD is 0.

    Args:
        softened: both sides, ``[B, C]``, and the weights.
        targets: ``[B]``, int64.
        alpha: weight of TCKD, the target class against all others.
        beta: weight of NCKD, the distribution over the others.
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
    """``T^2 * (alpha * TCKD + beta * NCKD)`` of logits divided by T, averaged over the batch (DKD, Eq. 7).

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class numbers.
        alpha: weight of the target-class part.
        beta: weight of the non-target part.
        temperature: T.

    Returns:
        A scalar in at least float32.
    """
    softened = Temperature(temperature).soften(student_logits, teacher_logits)
    return decoupled_divergence(softened, targets, alpha, beta)


@register("DKD")
class DKD(Distiller):
    """Decoupled knowledge distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20}
    need = Need.LOGITS

    def __init__(self, temperature: Temperature, alpha: float, beta: float, **weights: Any) -> None:
        super().__init__(**weights)
        refuse_negative(ALPHA=alpha, BETA=beta)
        self.temperature, self.alpha, self.beta = temperature, float(alpha), float(beta)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> DKD:
        """See :class:`Distiller`."""
        return cls(Temperature(node.T), node.ALPHA, node.BETA, ce_weight=node.CE_WEIGHT, warmup=node.WARMUP)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        softened = self.temperature.soften(student.logits, teacher.logits)
        return decoupled_divergence(softened, batch.targets, self.alpha, self.beta)
