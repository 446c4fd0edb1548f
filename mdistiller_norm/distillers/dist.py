"""DIST: the student's predictions correlate with the teacher's, sample by sample and class by class.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022): Pearson's distance
between the rows of the probabilities (inter-class) and between their columns (intra-class, over the batch).

Hyper-parameters: the authors' CIFAR-100 file (hunto/image_classification_sota, ``strategies/distill/dist_cifar.yaml``)
has temperature 4, beta = gamma = 1 and weighs their sum by 2; their ImageNet file temperature 1, weight 2. The factor
``T ** 2`` and the 1e-8 are their code's. They publish 76.31 for resnet32x4 -> resnet8x4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, refuse_negative, register
from mdistiller_norm.distillers.temperature import Temperature
from mdistiller_norm.types import Batch, Outputs, Softened


def _pearson(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Correlation of each row; 0 without gradient for one that is constant up to rounding."""
    sizes = [torch.linalg.vector_norm(rows, dim=1) for rows in (x, y)]
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    spreads = [torch.linalg.vector_norm(rows, dim=1) for rows in (x, y)]
    constant = (spreads[0] <= 1e-6 * sizes[0]) | (spreads[1] <= 1e-6 * sizes[1])
    correlation: Tensor = (x * y).sum(1) / (spreads[0] * spreads[1] + eps).masked_fill(constant, torch.inf)
    return correlation


def relation_distance(softened: Softened, beta: float, gamma: float) -> Tensor:
    """``weight * (beta * inter + gamma * intra)`` of softened logits with one weight for all; a scalar."""
    student, teacher = softened.student.softmax(1), softened.teacher.softmax(1)
    inter, intra = 1 - _pearson(student, teacher).mean(), 1 - _pearson(student.T, teacher.T).mean()
    return softened.weight.mean() * (beta * inter + gamma * intra)


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0
) -> Tensor:
    """``T^2 * (beta * inter + gamma * intra)``, each one minus a mean correlation of probabilities.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        beta: weight of the distance between rows, a sample's relation of the classes.
        gamma: weight of the distance between columns, a class's relation of the samples; constant for a batch of one.
        temperature: T.

    Returns:
        A scalar in at least float32.
    """
    return relation_distance(Temperature(temperature).soften(student_logits, teacher_logits), beta, gamma)


@register("DIST")
class DIST(Distiller):
    """Distillation of inter-class and intra-class relations."""

    defaults = {"TEMPERATURE": 4.0, "BETA": 1.0, "GAMMA": 1.0, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 2.0}}
    need = Need.LOGITS

    def __init__(self, temperature: Temperature, beta: float, gamma: float, **weights: Any) -> None:
        super().__init__(**weights)
        refuse_negative(BETA=beta, GAMMA=gamma)
        self.temperature, self.beta, self.gamma = temperature, float(beta), float(gamma)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> DIST:
        """See :class:`Distiller`."""
        weights = {"ce_weight": node.LOSS.CE_WEIGHT, "weight": node.LOSS.KD_WEIGHT}
        return cls(Temperature(node.TEMPERATURE), node.BETA, node.GAMMA, **weights)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return relation_distance(self.temperature.soften(student.logits, teacher.logits), self.beta, self.gamma)
