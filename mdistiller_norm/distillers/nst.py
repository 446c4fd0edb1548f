"""NST: matching of the distributions of the channels' activation patterns.

Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (2017): squared maximum
mean discrepancy of the channels, each a unit vector over the pixels, with the polynomial kernel ``(x . y) ** 2``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import register
from mdistiller_norm.distillers.common import StageDistiller, same_size, unit


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of ``(a_i . b_j) ** 2`` over the batch and all pairs of rows of ``[B, M, P]`` and ``[B, N, P]``."""
    (rows, points), columns = a.shape[1:], b.shape[1]
    if points < min(rows, columns):  # the same sum, computed with smaller matrices
        return (a.mT @ a * (b.mT @ b)).sum((1, 2)).mean() / (rows * columns)
    return (a @ b.mT).square().mean()


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Squared maximum mean discrepancy of the channels, averaged over the batch, summed over the stages.

    Args:
        g_s: maps of the student, ``[B, D_i, H_i, W_i]``.
        g_t: as many maps of the teacher; channels may differ, and the larger map is averaged to the smaller size.
    """
    losses = []
    for student, teacher in zip(g_s, g_t, strict=True):
        s, t = (unit(maps.flatten(2), 2) for maps in same_size(student, teacher))
        losses.append(_mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t))
    return torch.stack(losses).sum()


@register("NST")
class NST(StageDistiller):
    """Neuron selectivity transfer between matched stages."""

    defaults = {"WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 50.0}}
    loss = staticmethod(nst_loss)
