"""RKD: matching of the distances and angles between the samples of a batch.

Source: Park et al., "Relational Knowledge Distillation" (CVPR 2019), Eq. 6-11.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import PooledDistiller, at_least_float32, register


def _relations(points: Tensor, squared: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Distances ``[B, B]`` divided by their mean over those above 0, and cosines ``[B, B, B]`` at the first sample.

    Samples closer than ``eps`` in square count as equal: no direction and no gradient.
    """
    points = at_least_float32(points).flatten(1)
    difference = points[None, :] - points[:, None]
    square = difference.pow(2).sum(2)
    apart = square > eps
    # The gradient of sqrt is infinite at 0, even in a branch that is masked out.
    square = square.where(apart, 1.0)
    length = square.sqrt()
    others = 1 - torch.eye(len(points), dtype=points.dtype, device=points.device)
    equal = others * (eps if squared else eps**0.5)
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
    """Smooth L1 of the relations of student and teacher (Eq. 8 and 11), including the diagonals; 0 for one sample.

    Args:
        f_s: features of the student, ``[B, ...]``.
        f_t: features of the teacher; their dimension may differ.
        squared: compare squared distances.
        eps: squared distance below which two samples count as equal.
        distance_weight: weight of the mean over the ``B ** 2`` distances.
        angle_weight: weight of the mean over the ``B ** 3`` cosines.
    """
    distances_s, angles_s = _relations(f_s, squared, eps)
    distances_t, angles_t = _relations(f_t, squared, eps)
    loss_distance = F.smooth_l1_loss(distances_s, distances_t)
    return distance_weight * loss_distance + angle_weight * F.smooth_l1_loss(angles_s, angles_t)


@register("RKD")
class RKD(PooledDistiller):
    """Distances and angles of the pooled features."""

    defaults = {
        "DISTANCE_WEIGHT": 25.0,
        "ANGLE_WEIGHT": 50.0,
        "PDIST": {"EPSILON": 1e-12, "SQUARED": False},
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0},
    }
    meanings = {
        "DISTANCE_WEIGHT": "weight of the distances",
        "ANGLE_WEIGHT": "weight of the angles",
        "PDIST.EPSILON": "squared distance below which samples count as equal",
        "PDIST.SQUARED": "compare squared distances",
    }
    loss = staticmethod(rkd_loss)
    arguments = {
        "squared": "PDIST.SQUARED",
        "eps": "PDIST.EPSILON",
        "distance_weight": "DISTANCE_WEIGHT",
        "angle_weight": "ANGLE_WEIGHT",
    }
