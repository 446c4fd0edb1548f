"""DTKD: a temperature for each sample, shared between student and teacher by their largest logits.

Source: Wei and Bai, "Dynamic Temperature Knowledge Distillation" (2024, arXiv:2404.12711). The paper measures sharpness
by the log-sum-exp of the logits; the authors' code (JinYu1998/DTKD), followed here, uses the largest logit. They later
withdrew the derivation of the temperatures (Eq. 4-5), not the results. If the largest logit is not positive, the code
divides by a temperature <= 0; here it counts as barely positive, so two such samples get the plain temperature.

Defaults: the authors', also for resnet32x4 -> resnet8x4 (alpha 3, beta 1, T 4, cross entropy 1, warm-up 20 epochs).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Pair, loss_weights, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import FLOOR, Temperature, maximum
from mdistiller_norm.types import Batch, Outputs, Softened


def dtkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 3.0,
    beta: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    """``alpha * T_s T_t KL(p_t || p_s)`` at ``T_s = 2 T m_s / (m_s + m_t)`` plus ``beta * T^2 KL`` at T, batch mean.

    ``m_s`` and ``m_t`` are the largest logits of a sample, and ``T_t = 2 T - T_s``. Gradients include ``m_s``.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
    """
    softened = Temperature(temperature).soften(student_logits, teacher_logits)
    # The shares do not change if all logits are divided by T.
    height_s, height_t = (maximum(side).clamp_min(FLOOR) for side in (softened.student, softened.teacher))
    share_s, share_t = (2 * height / (height_s + height_t) for height in (height_s, height_t))
    weight = softened.weight * (share_s * share_t).squeeze(1)
    dynamic = Softened(softened.student / share_s, softened.teacher / share_t, weight)
    return alpha * kl_divergence(dynamic) + beta * kl_divergence(softened)


@register("DTKD")
class DTKD(Distiller):
    """Dynamic temperature knowledge distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 3.0, "BETA": 1.0, "T": 4.0, "WARMUP": 20}
    meanings = {
        "ALPHA": "weight of the part with dynamic temperatures", "BETA": "weight of the part with the temperature T",
    }  # fmt: skip

    def __init__(self, alpha: float, beta: float, temperature: float, **weights: Any) -> None:
        super().__init__(**weights)
        Temperature(temperature)  # validates it
        self.alpha, self.beta, self.temperature = float(alpha), float(beta), float(temperature)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> DTKD:
        return cls(node.ALPHA, node.BETA, node.T, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return dtkd_loss(student.logits, teacher.logits, self.alpha, self.beta, self.temperature)
