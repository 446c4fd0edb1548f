"""NormKD: each sample's temperature is the spread of its own logits.

Source: Chi et al., "NormKD: Normalized Logits for Knowledge Distillation" (2023), Eq. 5-7 and Algorithm 1; the other
statistics are those of its Table 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Pair, register
from mdistiller_norm.distillers.kd import KD, kl_divergence
from mdistiller_norm.distillers.temperature import Temperature


def normkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, t_norm: float = 2.0, *, statistic: str = "std"
) -> Tensor:
    """``(T_norm * sigma_t)^2 * KL(p_t || p_s)`` of logits divided by ``T_norm * sigma``, averaged over the batch.

    Args:
        student_logits: ``[B, C]``; gradient flows through their standard deviation.
        teacher_logits: ``[B, C]``.
        t_norm: T_norm (Eq. 6), 2.0 for CIFAR-100 and 1.0 for ImageNet in the paper.
        statistic: ``std`` (unbiased), or Table 8's ``max`` and ``range``.

    Returns:
        A scalar in at least float32. A sample with constant logits is uniform as a student and counts 0 as a teacher.
    """
    return kl_divergence(Temperature(t_norm, statistic).soften(student_logits, teacher_logits))


@register("NormKD")
class NormKD(KD):
    """KD whose temperature is ``TEMPERATURE_NORM * STATISTIC(logits)`` for each sample, on both sides."""

    defaults = {"TEMPERATURE_NORM": 2.0, "STATISTIC": "std", "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> NormKD:
        """See :class:`Distiller`."""
        temperature = Temperature(node.TEMPERATURE_NORM, node.STATISTIC)
        return cls(temperature, ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.KD_WEIGHT)
