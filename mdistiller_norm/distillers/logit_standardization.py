"""Logit standardization for KD and DKD: NormKD's temperature with a constant weight.

Source: Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024), Algorithm 1. The loss of z-scored
logits is multiplied by the squared base temperature instead of each sample's temperature.

Defaults: as published for resnet32x4 -> resnet8x4 (sunshangquan/logit-standardization-KD, ``--base-temp 2 --kd-weight
9``; KD keeps its cross-entropy weight of 0.1, DKD multiplies alpha and beta by 9).
"""

from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, TargetDistiller, register
from mdistiller_norm.distillers.dkd import DKD, decoupled_divergence
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import soften


def lskd_loss(
    student_logits: Tensor, teacher_logits: Tensor, base_temperature: float = 2.0
) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of z-scored logits ``[B, C]`` divided by T, averaged over the batch."""
    return kl_divergence(soften(student_logits, teacher_logits, base_temperature, "std", "none"))


def lsdkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    base_temperature: float = 2.0,
) -> Tensor:
    """``T^2 * (alpha * TCKD + beta * NCKD)`` of z-scored logits divided by T; arguments as in ``dkd_loss``."""
    softened = soften(student_logits, teacher_logits, base_temperature, "std", "none")
    return decoupled_divergence(softened, targets, alpha, beta)


@register("LSKD")
class LSKD(LogitDistiller):
    """KD on standardized logits."""

    defaults = {"TEMPERATURE": 2.0, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9.0}}
    loss = staticmethod(lskd_loss)
    arguments = {"base_temperature": "TEMPERATURE"}


@register("LSDKD")
class LSDKD(TargetDistiller):
    """DKD on standardized logits."""

    defaults = {
        "TEMPERATURE": 2.0,
        "CE_WEIGHT": 1.0,
        "KD_WEIGHT": 9.0,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "WARMUP": 20,
    }
    meanings = DKD.meanings
    loss = staticmethod(lsdkd_loss)
    arguments = {"alpha": "ALPHA", "beta": "BETA", "base_temperature": "TEMPERATURE"}
