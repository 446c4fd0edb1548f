"""CTKD: KD with one temperature that is learned adversarially with increasing strength.

Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (AAAI 2023), global temperature. The gradient of
the temperature is reversed, so it maximises the loss; the strength of the reversal rises from 0 to 1 along a cosine.

Defaults: the authors' code (zhengli97/CTKD, ``scripts/run_cifar_distill.sh``, for resnet56 -> resnet20), where theta is
1 at the start.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Pair, loss_weights, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import soften
from mdistiller_norm.types import Batch, Outputs, Softened


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of logits divided by T, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        temperature: T, a positive scalar tensor that receives a gradient.
    """
    student, teacher, weight = soften(student_logits, teacher_logits, 1.0)
    softened = Softened(student / temperature, teacher / temperature, weight)
    return temperature**2 * kl_divergence(softened)


@register("CTKD")
class CTKD(Distiller):
    """KD with a learned temperature; the reversal of its gradient has full strength from epoch EPOCHS on."""

    defaults = {
        "T_START": 1.0,
        "T_RANGE": 20.0,
        "EPOCHS": 10,
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    }
    meanings = {
        "T_START": "smallest temperature",
        "T_RANGE": "largest temperature minus the smallest",
        "EPOCHS": "epochs until the temperature's gradient is fully reversed",
    }

    def __init__(self, start: float, span: float, epochs: int, **weights: Any) -> None:
        super().__init__(**weights)
        self.start, self.span, self.epochs = start, span, epochs
        self.theta = nn.Parameter(torch.ones(()))
        self.strength = nn.Buffer(torch.zeros(()), persistent=False)  # see begin_epoch

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        return cls(node.T_START, node.T_RANGE, node.EPOCHS, **loss_weights(node))

    def begin_epoch(self, epoch: int, seed: int) -> None:
        self.strength.fill_((1 - math.cos(math.pi * min(epoch / max(self.epochs, 1), 1.0))) / 2)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        # The value of theta with its gradient multiplied by -strength.
        theta = self.theta.detach() - self.strength * (self.theta - self.theta.detach())
        temperature = self.start + self.span * theta.sigmoid()
        return ctkd_loss(student.logits, teacher.logits, temperature)
