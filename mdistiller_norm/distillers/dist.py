"""DIST: Pearson correlation of the predictions of student and teacher.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022): Pearson's distance between the
rows of the probabilities (inter-class) and between their columns (intra-class, over the batch).

Defaults: the authors' CIFAR-100 file (hunto/image_classification_sota, ``strategies/distill/dist_cifar.yaml``); their
ImageNet file has temperature 1.
"""

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import LogitDistiller, register
from mdistiller_norm.distillers.temperature import soften


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each pair of rows; 0 without a gradient if one is constant up to rounding."""
    sizes = [torch.linalg.vector_norm(rows, dim=1) for rows in (x, y)]
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    spreads = [torch.linalg.vector_norm(rows, dim=1) for rows in (x, y)]
    constant = (spreads[0] <= 1e-6 * sizes[0]) | (spreads[1] <= 1e-6 * sizes[1])
    scale = (spreads[0] * spreads[1] + 1e-8).masked_fill(constant, torch.inf)
    return (x * y).sum(1).div(scale)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
) -> Tensor:
    """``T^2 * (beta * inter + gamma * intra)``, each part one minus a mean correlation of probabilities.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        beta: weight of the distance between rows (the classes of one sample).
        gamma: weight of the distance between columns (one class over the batch); constant for a batch of one.
    """
    softened = soften(student_logits, teacher_logits, temperature)
    student, teacher = softened.student.softmax(1), softened.teacher.softmax(1)
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return softened.weight.mean() * (beta * inter + gamma * intra)


@register("DIST")
class DIST(LogitDistiller):
    """Distillation of inter-class and intra-class relations."""

    defaults = {
        "TEMPERATURE": 4.0,
        "BETA": 1.0,
        "GAMMA": 1.0,
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 2.0},
    }
    meanings = {
        "BETA": "weight of the distance between the classes of a sample",
        "GAMMA": "weight of the distance between the samples of a class",
    }
    loss = staticmethod(dist_loss)
    arguments = {"beta": "BETA", "gamma": "GAMMA", "temperature": "TEMPERATURE"}
