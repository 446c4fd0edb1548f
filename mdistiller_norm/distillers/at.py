"""AT: matching of spatial attention maps.

Source: Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), section 3.1: the map of a stage is
the mean of ``|x| ** p`` over the channels, normalised to length 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import register
from mdistiller_norm.distillers.common import StageDistiller, same_size, unit


def at_loss(list_s: Sequence[Tensor], list_t: Sequence[Tensor], p: float = 2) -> Tensor:
    """Mean squared difference of the attention maps, summed over the stages.

    Args:
        list_s: maps of the student, ``[B, D_i, H_i, W_i]``.
        list_t: as many maps of the teacher; channels may differ, and the larger map is averaged to the smaller size.
        p: power of the activations, at least 1.
    """
    losses = []
    for student, teacher in zip(list_s, list_t, strict=True):
        energies = (maps.abs().pow(p).mean(1).flatten(1) for maps in same_size(student, teacher))
        attention_s, attention_t = (unit(energy, 1) for energy in energies)
        losses.append((attention_s - attention_t).pow(2).mean())
    return torch.stack(losses).sum()


@register("AT")
class AT(StageDistiller):
    """Attention transfer between matched stages."""

    defaults = {"P": 2.0, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0}}
    meanings = {"P": "power of the activations"}
    loss = staticmethod(at_loss)
    arguments = {"p": "P"}
