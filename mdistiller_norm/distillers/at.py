"""AT: the student looks where the teacher looks.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), section 3.1: the map of a stage is
the mean over the channels of ``|x| ** p``, normalised to length 1. As in mdistiller the loss is the mean squared
difference of the maps, summed over the stages, not the norm of Eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.maps import matched_stages, same_size
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def attention(maps: Tensor, p: float = 2) -> Tensor:
    """Attention of ``[B, D, H, W]``: ``[B, H * W]``, each row of length 1 (0 where the maps are all zero)."""
    energy = at_least_float32(maps).abs().pow(p).mean(1).flatten(1)
    # Length 1 whatever the scale: dividing by the peak first keeps the squares from overflowing and from vanishing.
    peak = energy.detach().amax(1, keepdim=True)
    return F.normalize(energy / peak.where(peak > 0, 1.0), dim=1)


def at_loss(list_s: Sequence[Tensor], list_t: Sequence[Tensor], p: float = 2) -> Tensor:
    """Squared difference of attention maps: mean over batch and pixels, summed over the stages.

    Args:
        list_s: the student's maps ``[B, D_i, H_i, W_i]``.
        list_t: the teacher's, as many; channels may differ, and of two sizes the larger is averaged down.
        p: power of the activations, at least 1.

    Returns:
        A scalar in at least float32.
    """
    losses = []
    for student, teacher in zip(list_s, list_t, strict=True):
        of_student, of_teacher = (attention(maps, p) for maps in same_size(student, teacher))
        losses.append((of_student - of_teacher).pow(2).mean())
    return torch.stack(losses).sum()


@register("AT")
class AT(Distiller):
    """Attention transfer between the stages (:mod:`~mdistiller_norm.distillers.maps` says which meet)."""

    defaults = {"P": 2.0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0}}
    need = Need.MAPS

    def __init__(self, p: float = 2, **weights: Any) -> None:
        super().__init__(**weights)
        self.p = p

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> AT:
        """See :class:`Distiller`."""
        if node.P < 1:
            raise ConfigError(f"AT.P is {node.P}: the power of the activations must be at least 1")
        matched_stages(pair.student.features, pair.teacher.features)
        return cls(node.P, ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return at_loss(*matched_stages(student.features, teacher.features), self.p)
