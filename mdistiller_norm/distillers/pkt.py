"""PKT: a sample's neighbours in the batch are as probable for the student as for the teacher.

Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018),
with the cosine kernel. The mean over all pairs instead of the sum, and the small constant, are the authors' code's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, register
from mdistiller_norm.distillers.vectors import unit
from mdistiller_norm.types import Batch, Outputs


def _neighbours(features: Tensor) -> Tensor:
    """``[B, D]`` to ``[B, B]``: cosines mapped to [0, 1], each row divided by its sum."""
    directions = unit(features, 1)
    similarity = (directions @ directions.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """``p_t * log(p_t / p_s)`` of the neighbour probabilities, averaged over all ``B * B`` pairs.

    Args:
        f_s: the student's features ``[B, D]``.
        f_t: the teacher's ``[B, E]``.
        eps: added to both probabilities under the logarithm.

    Returns:
        A scalar in at least float32; 0 for a batch of one.
    """
    student, teacher = _neighbours(f_s), _neighbours(f_t)
    # A cosine of -1 may round to a hair below 0: no logarithm of a negative number.
    logs = (teacher.clamp_min(0) + eps).log() - (student.clamp_min(0) + eps).log()
    return (teacher * logs).mean()


@register("PKT")
class PKT(Distiller):
    """Probabilistic knowledge transfer of the classifier's input."""

    defaults = {"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0}}
    need = Need.POOLED

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> PKT:
        """See :class:`Distiller`."""
        return cls(ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return pkt_loss(student.pooled, teacher.pooled)
