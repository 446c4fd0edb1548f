"""RLD: DKD without the mistakes of the teacher.

Source: Sun et al., "Knowledge Distillation with Refined Logits" (ICCV 2025). Sample confidence: the student is as
confident in the target as the teacher is in its top class, right or wrong. Masked correlation: only classes that the
teacher ranks below the target are compared. If the teacher is right and ``ALPHA_T`` is ``T``, this is DKD.

Defaults: the authors' (zju-SWJ/RLD). The paper has one temperature (their option ``--same-t``, here ``ALPHA_T`` equal
to ``T``).
"""

from torch import Tensor

from mdistiller_norm.distillers.base import TargetDistiller, register
from mdistiller_norm.distillers.dkd import DKD, binary_divergence, split_target
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import soften
from mdistiller_norm.types import Softened

_MASKED = -1e30  # finite: a row with all classes masked is uniform in both networks


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float = 1.0,
) -> Tensor:
    """``alpha * confidence + beta * correlation``, each ``T^2 * KL(teacher || student)``, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class indices y.
        alpha: weight of KL between (max p_t, rest) and (p_s[y], rest).
        beta: weight of KL over the classes with a teacher logit smaller than that of y; 0 if there is none.
        temperature: T of the correlation.
        confidence_temperature: T of the confidence.
    """
    sharp = soften(student_logits, teacher_logits, confidence_temperature)
    odds_s, _ = split_target(sharp.student, targets)
    odds_t, _ = split_target(sharp.teacher, sharp.teacher.argmax(1))
    confidence = (sharp.weight * binary_divergence(odds_s, odds_t)).mean()

    soft = soften(student_logits, teacher_logits, temperature)
    misleading = teacher_logits >= teacher_logits.gather(1, targets[:, None])
    student, teacher = (side.masked_fill(misleading, _MASKED) for side in soft[:2])
    correlation = kl_divergence(Softened(student, teacher, soft.weight))
    return alpha * confidence + beta * correlation


@register("RLD")
class RLD(TargetDistiller):
    """Refined logit distillation."""

    defaults = {
        "CE_WEIGHT": 1.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "ALPHA_T": 1.0,
        "T": 4.0,
        "WARMUP": 20,
    }
    meanings = {
        "ALPHA": "weight of the sample confidence",
        "BETA": "weight of the masked correlation",
        "ALPHA_T": "temperature of the sample confidence",
    }
    loss = staticmethod(rld_loss)
    arguments = DKD.arguments | {"confidence_temperature": "ALPHA_T"}
