"""DKD+NormKD: DKD's two parts on logits normalised by their own spread.

Source: NormKD paper, section 4 (rows DKD+NormKD). The paper prints no formula; this is that of its published code: the
standard deviation is over all classes and shared by both parts, and the sample's weight is ``(T_norm * sigma_t)^2``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Pair, register
from mdistiller_norm.distillers.dkd import DKD, decoupled_divergence
from mdistiller_norm.distillers.temperature import Temperature


def norm_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float,
    beta: float,
    t_norm: float = 2.0,
) -> Tensor:
    """``(T_norm * sigma_t)^2 * (alpha * TCKD + beta * NCKD)`` of logits divided by ``T_norm * sigma``.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class numbers.
        alpha: weight of the target-class part.
        beta: weight of the non-target part.
        t_norm: T_norm.

    Returns:
        A scalar in at least float32, the mean over the batch.
    """
    softened = Temperature(t_norm, "std").soften(student_logits, teacher_logits)
    return decoupled_divergence(softened, targets, alpha, beta)


@register("NormKD_W_DKD")
class NormKDWithDKD(DKD):
    """DKD with NormKD's temperature."""

    # LOSS is empty and unused; mdistiller's fork declares it, so its users' files may hold it.
    defaults = {"TEMPERATURE_NORM": 2.0, "LOSS": {}, "CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "WARMUP": 20}

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> NormKDWithDKD:
        """See :class:`Distiller`."""
        temperature = Temperature(node.TEMPERATURE_NORM, "std")
        return cls(temperature, node.ALPHA, node.BETA, ce_weight=node.CE_WEIGHT, warmup=node.WARMUP)
