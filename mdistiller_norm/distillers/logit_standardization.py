"""Logit standardisation for KD and DKD: NormKD's temperature with a constant weight.

Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024), Algorithm 1. Logits become z-scores
divided by a base temperature; the loss is multiplied by the base temperature squared, not by each sample's own.

The defaults are those published for resnet32x4 -> resnet8x4 (README of the authors' repository,
sunshangquan/logit-standardization-KD: ``--base-temp 2 --kd-weight 9``; KD keeps its cross-entropy weight of 0.1, and
DKD multiplies both alpha and beta by 9): 76.62 with KD, 77.01 with DKD. Other pairs use base temperatures 2 to 4 and
weights 1 to 18. Their code divides by ``sigma + 1e-7``; here a row without spread is uniform, which is its limit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Pair, register
from mdistiller_norm.distillers.dkd import DKD, decoupled_divergence
from mdistiller_norm.distillers.kd import KD, kl_divergence
from mdistiller_norm.distillers.temperature import Temperature


def _standardised(base_temperature: float) -> Temperature:
    return Temperature(base_temperature, "std", compensate=False)


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, base_temperature: float = 2.0) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of z-scored logits divided by T; ``[B, C]`` each in, a scalar out."""
    return kl_divergence(_standardised(base_temperature).soften(student_logits, teacher_logits))


def lsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    base_temperature: float = 2.0,
) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)`` of z-scored logits divided by T; a scalar."""
    softened = _standardised(base_temperature).soften(student_logits, teacher_logits)
    return decoupled_divergence(softened, targets, alpha, beta)


@register("LSKD")
class LSKD(KD):
    """KD on standardised logits."""

    defaults = {"TEMPERATURE": 2.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9.0}}

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> LSKD:
        """See :class:`Distiller`."""
        return cls(_standardised(node.TEMPERATURE), ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.KD_WEIGHT)


@register("LSDKD")
class LSDKD(DKD):
    """DKD on standardised logits."""

    defaults = {
        "TEMPERATURE": 2.0, "CE_WEIGHT": 1.0, "KD_WEIGHT": 9.0, "ALPHA": 1.0, "BETA": 8.0, "WARMUP": 20,
    }  # fmt: skip

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> LSDKD:
        """See :class:`Distiller`."""
        weights = {"ce_weight": node.CE_WEIGHT, "weight": node.KD_WEIGHT, "warmup": node.WARMUP}
        return cls(_standardised(node.TEMPERATURE), node.ALPHA, node.BETA, **weights)
