"""KD with one temperature or several.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015); NormKD paper, Eq. 2 (one temperature), Eq.
3-4 and Table 1 (several).
"""

from collections.abc import Sequence

from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, register
from mdistiller_norm.distillers.temperature import soften
from mdistiller_norm.types import Softened


def kl_divergence(softened: Softened) -> Tensor:
    """Average ``weight * KL(teacher || student)`` of softened logits over the batch."""
    log_student, log_teacher = softened.student.log_softmax(1), softened.teacher.log_softmax(1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(1)
    return (softened.weight * divergence).mean()


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Sequence[float] = 4.0
) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of logits divided by T, averaged over the batch (Eq. 2).

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        temperature: T. For a sequence, the probabilities are averaged over its temperatures before the divergence,
            which is multiplied by ``max(T)^2`` (Eq. 3-4).
    """
    return kl_divergence(soften(student_logits, teacher_logits, temperature))


@register("KD")
class KD(LogitDistiller):
    """Knowledge distillation with one fixed temperature or several."""

    defaults = {"TEMPERATURE": 4.0, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
    loss = staticmethod(kd_loss)
    arguments = {"temperature": "TEMPERATURE"}
