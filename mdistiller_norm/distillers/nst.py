"""NST: the distribution of the student's channels over the image matches the teacher's.

Source: Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (2017): squared
maximum mean discrepancy of the channels, each a vector of length 1 over the pixels, under the polynomial kernel
``(x . y) ** 2``. The sum over all stages, and the average over larger maps where sizes differ, are mdistiller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, register
from mdistiller_norm.distillers.maps import matched_stages, same_size
from mdistiller_norm.distillers.vectors import unit
from mdistiller_norm.types import Batch, Outputs


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of ``(a_i . b_j) ** 2`` over batch and pairs of rows of ``[B, M, P]`` and ``[B, N, P]``; a scalar."""
    (rows, points), columns = a.shape[1:], b.shape[1]
    if points < min(rows, columns):  # the same sum through the smaller matrices
        return (a.mT @ a * (b.mT @ b)).sum((1, 2)).mean() / (rows * columns)
    return (a @ b.mT).square().mean()


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Squared discrepancy of the channels' distributions, averaged over the batch, summed over the stages.

    Args:
        g_s: the student's maps ``[B, D_i, H_i, W_i]``.
        g_t: the teacher's, as many; channels may differ, and of two sizes the larger is averaged down.

    Returns:
        A scalar in at least float32.
    """
    losses = []
    for student, teacher in zip(g_s, g_t, strict=True):
        s, t = (unit(maps.flatten(2), 2) for maps in same_size(student, teacher))
        losses.append(_mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t))
    return torch.stack(losses).sum()


@register("NST")
class NST(Distiller):
    """Neuron selectivity transfer between the stages (:mod:`~mdistiller_norm.distillers.maps` says which meet)."""

    defaults = {"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 50.0}}
    need = Need.MAPS

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> NST:
        """See :class:`Distiller`."""
        matched_stages(pair.student.features, pair.teacher.features)
        return cls(ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return nst_loss(*matched_stages(student.features, teacher.features))
