"""RLD: DKD that does not hand down the teacher's mistakes.

Source: Sun et al., "Knowledge Distillation with Refined Logits" (ICCV 2025). Sample confidence: the student is as sure
of the target as the teacher is of its own favourite, right or wrong. Masked correlation: only classes that the teacher
ranks below the target are compared. Where the teacher is right, this is DKD.

Hyper-parameters: the authors' file for resnet32x4 -> resnet8x4 (zju-SWJ/RLD) leaves their defaults: alpha 1, beta 8,
T 4, cross entropy 1, warm-up 20 epochs, and temperature 1 for the confidence. The paper's formulas have one
temperature; the authors' README shows that for another pair (``--same-t``), which is ``ALPHA_T`` equal to ``T`` here.
They publish 76.64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, refuse_negative, register
from mdistiller_norm.distillers.dkd import binary_divergence, split_target
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.types import Batch, Outputs

# A logit that leaves its class no probability, and finite: a row without any class left is uniform on both sides.
_NEVER = -1e30


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    """``alpha * confidence + beta * correlation``, each KL(teacher || student) times its temperature squared.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class numbers y.
        alpha: weight of KL between (max p_t, rest) and (p_s[y], rest).
        beta: weight of KL over the classes whose teacher logit is smaller than that of y; 0 where there is none.
        temperature: T of the correlation.
        confidence_temperature: T of the confidence.

    Returns:
        A scalar in at least float32, the mean over the batch.
    """
    sharp = Temperature(confidence_temperature).soften(student_logits, teacher_logits)
    odds_s, _ = split_target(sharp.student, targets)
    odds_t, _ = split_target(sharp.teacher, sharp.teacher.argmax(1))
    confidence = (sharp.weight * binary_divergence(odds_s, odds_t)).mean()

    soft = Temperature(temperature).soften(student_logits, teacher_logits)
    misleading = teacher_logits >= teacher_logits.gather(1, targets[:, None])
    student, teacher = (side.masked_fill(misleading, _NEVER) for side in (soft.student, soft.teacher))
    return alpha * confidence + beta * kl_divergence(soft._replace(student=student, teacher=teacher))


@register("RLD")
class RLD(Distiller):
    """Refined logit distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "ALPHA_T": 1.0, "T": 4.0, "WARMUP": 20}
    need = Need.LOGITS

    def __init__(self, alpha: float, beta: float, temperature: float, confidence_temperature: float, **weights: Any):
        super().__init__(**weights)
        for scale in (temperature, confidence_temperature):
            Temperature(scale)  # refuses a bad one now, not in the first step
        refuse_negative(ALPHA=alpha, BETA=beta)
        self.alpha, self.beta = float(alpha), float(beta)
        self.temperature, self.confidence_temperature = float(temperature), float(confidence_temperature)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> RLD:
        """See :class:`Distiller`."""
        return cls(node.ALPHA, node.BETA, node.T, node.ALPHA_T, ce_weight=node.CE_WEIGHT, warmup=node.WARMUP)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        temperatures = self.temperature, self.confidence_temperature
        return rld_loss(student.logits, teacher.logits, batch.targets, self.alpha, self.beta, *temperatures)
