"""RKD: the student keeps the distances and the angles between the samples of a batch.

Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), Eq. 6-11.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, refuse_negative, register
from mdistiller_norm.types import Batch, Outputs


def relations(points: Tensor, squared: bool = False, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Distances over their mean, and the cosines of all triplets.

    Both come from differences of samples, not from a Gram matrix, so an offset that all samples share costs no
    precision. Equal samples are ``eps`` apart in square, in no direction, and have no gradient between them.

    Args:
        points: ``[B, ...]``, a sample a row; flattened.
        squared: squared distances instead of Euclidean ones.
        eps: squared distance below which two samples count as equal.

    Returns:
        Distances ``[B, B]`` divided by the mean over those above 0, and cosines ``[B, B, B]``: entry ``[i, j, k]`` is
        the angle at i between j and k, 0 where one of them equals i.
    """
    points = at_least_float32(points).flatten(1)
    difference = points[None, :] - points[:, None]
    square = difference.pow(2).sum(2)
    apart = square > eps
    # The square root's slope is infinite at 0: it must not see a zero, not even in the branch that is dropped.
    square = square.where(apart, 1.0)
    length = square.sqrt()
    equal = (1 - torch.eye(len(points), dtype=points.dtype, device=points.device)) * (eps if squared else eps**0.5)
    distances = (square if squared else length).where(apart, equal)
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    distances = distances / mean.where(mean > 0, 1.0)
    directions = difference.where(apart[:, :, None], 0.0) / length[:, :, None]
    return distances, directions @ directions.transpose(1, 2)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """Smooth L1 between the relations in the student and in the teacher (Eq. 8 and 11), diagonals included.

    Args:
        f_s: the student's features ``[B, ...]``; 0 for a batch of one.
        f_t: the teacher's; their dimension may differ.
        squared: compare squared distances.
        eps: see :func:`relations`.
        distance_weight: weight of the mean over the ``B ** 2`` distances.
        angle_weight: weight of the mean over the ``B ** 3`` cosines.

    Returns:
        A scalar in at least float32.
    """
    distances_s, angles_s = relations(f_s, squared, eps)
    distances_t, angles_t = relations(f_t, squared, eps)
    loss_distance = F.smooth_l1_loss(distances_s, distances_t)
    return distance_weight * loss_distance + angle_weight * F.smooth_l1_loss(angles_s, angles_t)


@register("RKD")
class RKD(Distiller):
    """Distance-wise and angle-wise relations of the pooled features."""

    defaults = {
        "DISTANCE_WEIGHT": 25.0,
        "ANGLE_WEIGHT": 50.0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
        "PDIST": {"EPSILON": 1e-12, "SQUARED": False},
    }
    need = Need.POOLED

    def __init__(self, squared: bool, eps: float, distance_weight: float, angle_weight: float, **weights: Any) -> None:
        super().__init__(**weights)
        refuse_negative(EPSILON=eps, DISTANCE_WEIGHT=distance_weight, ANGLE_WEIGHT=angle_weight)
        self.squared, self.eps = squared, eps
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> RKD:
        """See :class:`Distiller`."""
        return cls(
            bool(node.PDIST.SQUARED),
            node.PDIST.EPSILON,
            node.DISTANCE_WEIGHT,
            node.ANGLE_WEIGHT,
            ce_weight=node.LOSS.CE_WEIGHT,
            weight=node.LOSS.FEAT_WEIGHT,
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        weights = (self.distance_weight, self.angle_weight)
        return rkd_loss(student.pooled, teacher.pooled, self.squared, self.eps, *weights)
