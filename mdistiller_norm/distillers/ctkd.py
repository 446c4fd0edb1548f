"""CTKD: KD with one temperature that is learned adversarially with increasing strength.

Source: Li et al., "Curriculum Temperature for Knowledge Distillation" (AAAI 2023), global temperature. The gradient of
the temperature is reversed, so it maximises the loss; the strength of the reversal rises from 0 to 1 along a cosine.

Defaults: the authors' code (zhengli97/CTKD, ``scripts/run_cifar_distill.sh``, for resnet56 -> resnet20): T = 1 + 20 *
sigmoid(theta) with theta = 1 at the start, full strength from epoch 10, weights 0.1 and 0.9. Sun et al. (CVPR 2024)
report 73.39 for resnet32x4 -> resnet8x4. As in the code, theta is subject to weight decay, and its gradient includes
the factor ``T ** 2``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Pair, loss_weights, register
from mdistiller_norm.distillers.kd import kl_divergence
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def reverse_gradient(x: Tensor, strength: Tensor | float = 1.0) -> Tensor:
    """Return ``x`` with its gradient multiplied by ``-strength``."""
    return x.detach() - strength * (x - x.detach())


def ctkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """``T^2 * KL(p_t || p_s)`` of logits divided by T, averaged over the batch.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        temperature: T, a positive scalar tensor that receives a gradient.
    """
    plain = Temperature(1.0).soften(student_logits, teacher_logits)
    softened = plain._replace(student=plain.student / temperature, teacher=plain.teacher / temperature)
    return temperature**2 * kl_divergence(softened)


@register("CTKD")
class CTKD(Distiller):
    """Curriculum temperature ``T = start + span * sigmoid(theta)``, reversed with full strength from ``epochs`` on."""

    defaults = {
        "T_START": 1.0, "T_RANGE": 20.0, "EPOCHS": 10, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
    }  # fmt: skip
    meanings = {
        "T_START": "smallest temperature", "T_RANGE": "largest temperature minus the smallest",
        "EPOCHS": "epochs until the temperature's gradient is fully reversed",
    }  # fmt: skip

    theta: Tensor
    strength: Tensor

    def __init__(self, start: float, span: float, epochs: int, **weights: Any) -> None:
        super().__init__(**weights)
        if not (start > 0 and span >= 0 and math.isfinite(start + span)):
            raise ConfigError(f"CTKD.T_START must be > 0 and CTKD.T_RANGE >= 0, got {start} and {span}")
        if epochs < 1:
            raise ConfigError(f"CTKD.EPOCHS must be >= 1, got {epochs}")
        self.start, self.span, self.epochs = float(start), float(span), int(epochs)
        self.theta = nn.Parameter(torch.ones(()))
        # Not saved: begin_epoch computes it from the epoch.
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> CTKD:
        return cls(node.T_START, node.T_RANGE, node.EPOCHS, **loss_weights(node))

    def begin_epoch(self, epoch: int, seed: int) -> None:
        self.strength.fill_((1 - math.cos(math.pi * min(epoch / self.epochs, 1.0))) / 2)

    @property
    def temperature(self) -> Tensor:
        """Current temperature, a scalar with a reversed gradient."""
        return self.start + self.span * reverse_gradient(self.theta, self.strength).sigmoid()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return ctkd_loss(student.logits, teacher.logits, self.temperature)
