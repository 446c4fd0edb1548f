"""SP: samples that look alike to the teacher look alike to the student.

Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019), Eq. 2-4. One map only, the last, as
in mdistiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.vectors import unit
from mdistiller_norm.types import Batch, Outputs


def _similarities(maps: Tensor) -> Tensor:
    """``[B, ...]`` to ``[B, B]``: inner products of the samples, each row of length 1."""
    flat = at_least_float32(maps).flatten(1)
    # One scale for the whole batch changes nothing, and keeps the products from overflowing.
    peak = flat.detach().abs().amax()
    flat = flat / peak.masked_fill(peak == 0, 1)
    return unit(flat @ flat.T, 1)


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the ``B * B`` normalised similarities, summed over the maps.

    Args:
        g_s: the student's maps, ``[B, ...]``.
        g_t: the teacher's, as many; only the batch must agree.

    Returns:
        A scalar in at least float32.
    """
    pairs = zip(g_s, g_t, strict=True)
    return torch.stack([(_similarities(t) - _similarities(s)).square().mean() for s, t in pairs]).sum()


@register("SP")
class SP(Distiller):
    """Similarity-preserving distillation of the last map."""

    defaults = {"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 3000.0}}
    need = Need.MAPS

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> SP:
        """See :class:`Distiller`."""
        return cls(ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return sp_loss(student.features[-1:], teacher.features[-1:])
