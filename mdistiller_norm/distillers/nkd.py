"""NKD: soft cross entropy of the target class, and of the other classes normalised without it.

Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels" (ICCV 2023), and the authors' code (yzd-v/cls_KD, ``dis_losses/nkd.py``). The target
part has no temperature and no logarithm of the teacher, so the loss is not 0 for equal logits.

Defaults: the authors' CIFAR-100 file (ResNet34 -> ResNet18): gamma 3.5, temperature 3; their ImageNet files have gamma
1.5, temperature 1. They publish none for resnet32x4 -> resnet8x4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Pair, at_least_float32, loss_weights, register
from mdistiller_norm.distillers.dkd import split_target
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.types import Batch, Outputs


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    gamma: float = 3.5,
    temperature: float = 3.0,
) -> Tensor:
    """``-p_t[y] log p_s[y] - gamma * T^2 * sum over i != y of q_t[i] log q_s[i]``, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        targets: ``[B]``, int64 class indices y.
        temperature: T of q, the probabilities of the classes other than y among themselves; p has none.
    """
    softened = Temperature(temperature).soften(student_logits, teacher_logits)
    (_, others_s), (_, others_t) = (
        split_target(softened.student, targets),
        split_target(softened.teacher, targets),
    )
    log_s, log_t = (
        at_least_float32(logits).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        for logits in (student_logits, teacher_logits)
    )
    rest = softened.weight * (others_t.exp() * others_s).sum(1)
    return -(log_t.exp() * log_s + gamma * rest).mean()


@register("NKD")
class NKD(Distiller):
    """Normalized knowledge distillation."""

    defaults = {"TEMPERATURE": 3.0, "GAMMA": 3.5, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0}}
    meanings = {"GAMMA": "weight of the non-target part"}

    def __init__(self, gamma: float, temperature: float, **weights: Any) -> None:
        super().__init__(**weights)
        Temperature(temperature)  # validates it
        self.gamma, self.temperature = float(gamma), float(temperature)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> NKD:
        return cls(node.GAMMA, node.TEMPERATURE, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return nkd_loss(student.logits, teacher.logits, batch.targets, self.gamma, self.temperature)
