"""AT: matching of spatial attention maps.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), section 3.1: the map of a stage is
the mean of ``|x| ** p`` over the channels, normalised to length 1. As in mdistiller the loss is the mean squared
difference of the maps, summed over the stages, not the norm of Eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, loss_weights, register
from mdistiller_norm.distillers.common import matched_stages, same_size
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def _attention(maps: Tensor, p: float) -> Tensor:
    """Attention map ``[B, H * W]`` with rows of length 1, or 0 if the maps are all zero."""
    energy = at_least_float32(maps).abs().pow(p).mean(1).flatten(1)
    # The division by the peak avoids overflow and underflow of the squares.
    peak = energy.detach().amax(1, keepdim=True)
    return F.normalize(energy / peak.where(peak > 0, 1.0), dim=1)


def at_loss(list_s: Sequence[Tensor], list_t: Sequence[Tensor], p: float = 2) -> Tensor:
    """Mean squared difference of the attention maps, summed over the stages.

    Args:
        list_s: maps of the student, ``[B, D_i, H_i, W_i]``.
        list_t: as many maps of the teacher; channels may differ, and the larger map is averaged to the smaller size.
        p: power of the activations, at least 1.
    """
    losses = []
    for student, teacher in zip(list_s, list_t, strict=True):
        attention_s, attention_t = (_attention(maps, p) for maps in same_size(student, teacher))
        losses.append((attention_s - attention_t).pow(2).mean())
    return torch.stack(losses).sum()


@register("AT")
class AT(Distiller):
    """Attention transfer between matched stages."""

    defaults = {"P": 2.0, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0}}
    meanings = {"P": "power of the activations"}
    need = Need.MAPS

    def __init__(self, p: float = 2, **weights: Any) -> None:
        super().__init__(**weights)
        self.p = p

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> AT:
        if node.P < 1:
            raise ConfigError(f"AT.P must be >= 1, got {node.P}")
        matched_stages(pair.student.features, pair.teacher.features)  # checks them
        return cls(node.P, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return at_loss(*matched_stages(student.features, teacher.features), self.p)
