"""DTKD: student and teacher share out twice the temperature by the height of their own logits.

Source: Wei and Bai, "Dynamic Temperature Knowledge Distillation" (2024, arXiv:2404.12711). The paper measures
sharpness by the log-sum-exp of the logits; the temperatures follow the largest logit, in the authors' code
(JinYu1998/DTKD) as here. Their README withdraws the derivation of the temperatures (Eq. 4-5), not the results.
The code divides by negative or zero temperatures where the largest logit is not positive; here it counts as barely
positive, so that two such sides meet at the plain temperature.

Hyper-parameters: the authors' file for resnet32x4 -> resnet8x4 leaves their defaults: alpha 3, beta 1, T 4, cross
entropy 1, warm-up 20 epochs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, refuse_negative, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import FLOOR, Temperature, maximum
from mdistiller_norm.types import Batch, Outputs, Softened


def dtkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 3.0, beta: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """``alpha * T_s T_t KL(p_t || p_s)`` at ``T_s = 2 T m_s / (m_s + m_t)`` plus ``beta * T^2 KL`` at T.

    Args:
        student_logits: ``[B, C]``; ``m_s`` is the largest of a sample, gradient flows through it.
        teacher_logits: ``[B, C]``; ``m_t`` likewise, and ``T_t = 2 T - T_s``.
        alpha: weight of the part with dynamic temperatures.
        beta: weight of plain KD.
        temperature: T.

    Returns:
        A scalar in at least float32, the mean over the batch.
    """
    softened = Temperature(temperature).soften(student_logits, teacher_logits)
    # Shares of the whole: they are the same for logits already divided by T.
    height_s, height_t = (maximum(side).clamp_min(FLOOR) for side in (softened.student, softened.teacher))
    share_s, share_t = (2 * height / (height_s + height_t) for height in (height_s, height_t))
    weight = softened.weight * (share_s * share_t).squeeze(1)
    dynamic = Softened(softened.student / share_s, softened.teacher / share_t, weight)
    return alpha * kl_divergence(dynamic) + beta * kl_divergence(softened)


@register("DTKD")
class DTKD(Distiller):
    """Dynamic temperature knowledge distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 3.0, "BETA": 1.0, "T": 4.0, "WARMUP": 20}
    need = Need.LOGITS

    def __init__(self, alpha: float, beta: float, temperature: float, **weights: Any) -> None:
        super().__init__(**weights)
        Temperature(temperature)  # refuses a bad one now, not in the first step
        refuse_negative(ALPHA=alpha, BETA=beta)
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> DTKD:
        """See :class:`Distiller`."""
        return cls(node.ALPHA, node.BETA, node.T, ce_weight=node.CE_WEIGHT, warmup=node.WARMUP)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return dtkd_loss(student.logits, teacher.logits, self.alpha, self.beta, self.temperature)
