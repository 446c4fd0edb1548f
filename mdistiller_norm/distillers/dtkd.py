"""DTKD: a temperature for each sample, shared between student and teacher by their largest logits.

Source: Wei and Bai, "Dynamic Temperature Knowledge Distillation" (2024, arXiv:2404.12711). The paper measures sharpness
by the log-sum-exp of the logits; the authors' code (JinYu1998/DTKD), followed here, uses the largest logit. They later
withdrew the derivation of the temperatures (Eq. 4-5), not the results. If the largest logit is not positive, the code
divides by a temperature <= 0; here it counts as barely positive. Defaults: the authors'.
"""

from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import FLOOR, maximum, soften
from mdistiller_norm.types import Softened


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
    softened = soften(student_logits, teacher_logits, temperature)
    # The shares do not change if all logits are divided by T.
    height_s, height_t = (maximum(side).clamp_min(FLOOR) for side in softened[:2])
    share_s, share_t = (2 * height / (height_s + height_t) for height in (height_s, height_t))
    weight = softened.weight * (share_s * share_t).squeeze(1)
    dynamic = Softened(softened.student / share_s, softened.teacher / share_t, weight)
    return alpha * kl_divergence(dynamic) + beta * kl_divergence(softened)


@register("DTKD")
class DTKD(LogitDistiller):
    """Dynamic temperature knowledge distillation."""

    defaults = {"CE_WEIGHT": 1.0, "ALPHA": 3.0, "BETA": 1.0, "T": 4.0, "WARMUP": 20}
    meanings = {
        "ALPHA": "weight of the part with dynamic temperatures",
        "BETA": "weight of the part with the temperature T",
    }
    loss = staticmethod(dtkd_loss)
    arguments = {"alpha": "ALPHA", "beta": "BETA", "temperature": "T"}
