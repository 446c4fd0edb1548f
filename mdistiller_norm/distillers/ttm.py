"""TTM and WTTM: a temperature for the teacher only, as a power of its probabilities.

Source: Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching" (ICLR 2024), Algorithm 1. With
exponent ``gamma = 1 / T`` the teacher is ``p ** gamma`` renormalised; WTTM weights a sample by the normalising sum,
which is large if the teacher is uncertain. There is no factor ``T ** 2``. Defaults: Table 8.
"""

from typing import Any, Self

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, Pair, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import soften
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Softened, at_least_float32


def _transformed(student_logits: Tensor, teacher_logits: Tensor, gamma: float) -> Softened:
    _, teacher, weight = soften(student_logits, teacher_logits, 1 / gamma)
    return Softened(at_least_float32(student_logits), teacher, torch.ones_like(weight))


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
    softened = _transformed(student_logits, teacher_logits, gamma)
    return kl_divergence(softened._replace(weight=power_sum))


@register("TTM")
class TTM(LogitDistiller):
    """Transformed teacher matching."""

    defaults = {"GAMMA": 0.1, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 100.0}}
    meanings = {"GAMMA": "exponent of the teacher's probabilities, 1 / T"}
    loss = staticmethod(ttm_loss)
    arguments = {"gamma": "GAMMA"}

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        if node.GAMMA <= 0:
            raise ConfigError(f"{cls.__name__}.GAMMA must be > 0, got {node.GAMMA}")
        return super().from_config(node, pair)


@register("WTTM")
class WTTM(TTM):
    """Transformed teacher matching, with samples weighted by the teacher's uncertainty."""

    defaults = {"GAMMA": 0.1, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 3.0}}
    loss = staticmethod(wttm_loss)
