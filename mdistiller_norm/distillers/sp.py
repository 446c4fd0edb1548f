"""SP: matching of the similarities within a batch.

Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019), Eq. 2-4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, register
from mdistiller_norm.distillers.common import unit
from mdistiller_norm.types import Batch, Outputs, at_least_float32


def _similarities(maps: Tensor) -> Tensor:
    flat = at_least_float32(maps).flatten(1)
    # One scale for the whole batch does not change the result and avoids overflow.
    peak = flat.detach().abs().amax()
    flat = flat / peak.masked_fill(peak == 0, 1)
    return unit(flat @ flat.T, 1)


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the ``B * B`` normalised similarities, summed over the maps.

    Args:
        g_s: maps of the student, ``[B, ...]``.
        g_t: as many maps of the teacher; only the batch size must match.
    """
    pairs = zip(g_s, g_t, strict=True)
    losses = [(_similarities(t) - _similarities(s)).square().mean() for s, t in pairs]
    return torch.stack(losses).sum()


@register("SP")
class SP(Distiller):
    """Similarity-preserving distillation of the last map."""

    defaults = {"WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 3000.0}}
    need = Need.MAPS

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return sp_loss(student.features[-1:], teacher.features[-1:])
