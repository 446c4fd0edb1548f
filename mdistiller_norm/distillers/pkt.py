"""PKT: matching of the similarities within a batch as probability distributions.

Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018), with the
cosine kernel. Mean and constant: the authors' code.
"""

from torch import Tensor

from mdistiller_norm.distillers.base import PooledDistiller, register
from mdistiller_norm.distillers.common import unit


def _neighbours(features: Tensor) -> Tensor:
    directions = unit(features, 1)
    similarity = (directions @ directions.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """``p_t * log(p_t / p_s)`` of the neighbour probabilities, averaged over all ``B * B`` pairs; 0 for one sample.

    Args:
        f_s: features of the student, ``[B, D]``.
        f_t: features of the teacher, ``[B, E]``.
        eps: added to both probabilities in the logarithm.
    """
    student, teacher = _neighbours(f_s), _neighbours(f_t)
    # Rounding can make the similarity of opposite vectors negative.
    logs = (teacher.clamp_min(0) + eps).log() - (student.clamp_min(0) + eps).log()
    return (teacher * logs).mean()


@register("PKT")
class PKT(PooledDistiller):
    """Probabilistic knowledge transfer of the pooled features."""

    defaults = {"WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0}}
    loss = staticmethod(pkt_loss)
