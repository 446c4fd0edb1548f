"""TTM and WTTM: a temperature for the teacher only, as a power of its probabilities.

Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (ICLR 2024), Algorithm 1. With
exponent ``gamma = 1 / T`` the teacher is ``p ** gamma`` renormalised; WTTM weights a sample by the normalising sum,
which is large if the teacher is uncertain. There is no factor ``T ** 2``. Paper and code agree.

Defaults: Table 8 for resnet32x4 -> resnet8x4 (76.17 for TTM, 76.06 for WTTM): gamma 0.1, weight 100 (TTM) or 3 (WTTM).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Pair, at_least_float32, loss_weights, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, Softened


def _transformed(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Softened:
    """Soften the teacher only, at temperature ``1 / gamma``; every weight is 1."""
    softened = Temperature(1 / gamma).soften(student_logits, teacher_logits)
    return softened._replace(
        student=at_least_float32(student_logits), weight=torch.ones_like(softened.weight)
    )


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    """``KL(p_t^gamma / sum(p_t^gamma) || p_s)``, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        gamma: exponent of the teacher's probabilities, ``1 / T``.
    """
    return kl_divergence(_transformed(student_logits, teacher_logits, gamma))


def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    """:func:`ttm_loss` with each sample weighted by ``sum(p_t^gamma)``."""
    power_sum = (gamma * at_least_float32(teacher_logits).log_softmax(1)).logsumexp(1).exp()
    return kl_divergence(_transformed(student_logits, teacher_logits, gamma)._replace(weight=power_sum))


@register("TTM")
class TTM(Distiller):
    """Transformed teacher matching."""

    defaults = {"GAMMA": 0.1, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 100.0}}
    meanings = {"GAMMA": "exponent of the teacher's probabilities, 1 / T"}

    def __init__(self, gamma: float, **weights: Any) -> None:
        super().__init__(**weights)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ConfigError(f"{type(self).__name__}.GAMMA must be > 0 and finite, got {gamma}")
        self.gamma = float(gamma)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> TTM:
        return cls(node.GAMMA, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return ttm_loss(student.logits, teacher.logits, self.gamma)


@register("WTTM")
class WTTM(TTM):
    """Transformed teacher matching, with samples weighted by the teacher's uncertainty."""

    defaults = {"GAMMA": 0.1, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 3.0}}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return wttm_loss(student.logits, teacher.logits, self.gamma)
