"""CTKD: KD whose one temperature is learned against the student, harder from epoch to epoch.

Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (AAAI 2023), global temperature: its gradient is
reversed, so that it climbs the loss that the student descends, by a strength that rises from 0 to 1 along a cosine.

Hyper-parameters: the authors' code (zhengli97/CTKD, ``scripts/run_cifar_distill.sh``): T = 1 + 20 * sigmoid(theta) with
theta from 1, the strength at 1 from epoch 10 on, weights 0.1 and 0.9. The script is for resnet56 -> resnet20; for
resnet32x4 -> resnet8x4 the authors' repository shows nothing, Sun et al. (CVPR 2024) report 73.39. As in the code the
parameter is under the optimizer's weight decay, and the factor ``T ** 2`` takes part in its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Need, Pair, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def reverse_gradient(x: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """``x`` itself, with its gradient multiplied by ``-strength``."""
    return x.detach() - strength * (x - x.detach())


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of logits divided by T, averaged over the batch.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        temperature: T, a positive scalar; gradient flows to it.

    Returns:
        A scalar in at least float32.
    """
    plain = Temperature(1.0).soften(student_logits, teacher_logits)
    softened = plain._replace(student=plain.student / temperature, teacher=plain.teacher / temperature)
    return temperature**2 * kl_divergence(softened)


@register("CTKD")
class CTKD(Distiller):
    """Curriculum temperature: ``T = start + span * sigmoid(theta)``, theta learned through reversed gradients.

    Args:
        start: smallest temperature.
        span: largest temperature minus the smallest.
        epochs: how many epochs the strength of the reversal takes to reach 1.
    """

    defaults = {"T_START": 1.0, "T_RANGE": 20.0, "EPOCHS": 10, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
    need = Need.LOGITS

    theta: Tensor
    strength: Tensor

    def __init__(self, start: float, span: float, epochs: int, **weights: Any) -> None:
        super().__init__(**weights)
        if not (start > 0 and span >= 0 and math.isfinite(start + span)):
            raise ConfigError(f"CTKD.T_START is {start} and T_RANGE {span}: temperatures must be positive and finite")
        if epochs < 1:
            raise ConfigError(f"CTKD.EPOCHS is {epochs}: the curriculum takes at least 1 epoch")
        self.start, self.span, self.epochs = float(start), float(span), int(epochs)
        self.theta = nn.Parameter(torch.ones(()))
        # A function of the epoch, written before each: nothing to save.
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> CTKD:
        """See :class:`Distiller`."""
        weights = {"ce_weight": node.LOSS.CE_WEIGHT, "weight": node.LOSS.KD_WEIGHT}
        return cls(node.T_START, node.T_RANGE, node.EPOCHS, **weights)

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """The cosine curriculum: about 0.02 in the first of ten epochs, 1 from the tenth on."""
        self.strength.fill_((1 - math.cos(math.pi * min(epoch / self.epochs, 1.0))) / 2)

    @property
    def temperature(self) -> Tensor:
        """The temperature learned so far, a scalar whose gradient is reversed."""
        return self.start + self.span * reverse_gradient(self.theta, self.strength).sigmoid()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return ctkd_loss(student.logits, teacher.logits, self.temperature)
