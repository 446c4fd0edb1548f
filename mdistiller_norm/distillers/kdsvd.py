"""KDSVD: relations of the leading singular vectors of adjacent stages.

Source: Lee et al., "Self-Supervised Knowledge Distillation Using Singular Value Decomposition" (ECCV 2018). The paper
and RepDistiller decompose a map as ``[H * W, D]``; mdistiller, followed here, decomposes it as ``[D * H, W]``. Changes:
the arbitrary signs of the singular vectors are fixed (the teacher's components have a positive sum, and the student's
vectors follow the teacher's); the gradient is finite for equal and zero singular values.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Pair, at_least_float32, register
from mdistiller_norm.distillers.common import StageDistiller, match_stages, same_size, shapes
from mdistiller_norm.errors import ConfigError

# Eigenvalues closer than this, relative to the largest, count as equal and do not mix in the gradient.
_GAP = 1e-6
_SPARE = 3  # number of additional candidates for each vector of the teacher


def leading_vectors(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading right singular vectors of ``[B, D, H, W]`` as ``[D * H, W]``.

    Returns:
        Vectors ``[B, W, count]``, largest first, zero for a singular value of 0, and the singular values
        ``[B, count]``, without a gradient and relative to the largest element of the map.
    """
    rows = at_least_float32(maps).flatten(1, 2)
    peak = rows.detach().abs().amax((1, 2), keepdim=True)
    rows = rows / peak.masked_fill(peak == 0, 1)
    gram = rows.mT @ rows
    with torch.no_grad():
        # The solver raises for non-finite input; the trainer reports a non-finite loss by name.
        values, basis = torch.linalg.eigh(gram.nan_to_num())
        top, vectors = values[:, -count:].flip(1), basis[..., -count:].flip(2)
        floor = _GAP * values[:, -1:].clamp_min(1e-6)
        vectors = vectors * (top > floor).unsqueeze(1)
        gap = top.unsqueeze(1) - values.unsqueeze(2)
        rate = gap / (gap.square() + floor.unsqueeze(2).square())
    # First-order change of the eigenvectors: zero in value, but it has their derivative.
    change = basis @ (rate * (basis.mT @ (gram - gram.detach()) @ vectors))
    return vectors + change, top.clamp_min(0).sqrt()


def _sign(x: Tensor) -> Tensor:
    return 1 - 2 * (x < 0).to(x.dtype)


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int = 1) -> Tensor:
    """Sum of squared differences of ``exp(-(v_i - w_j)^2 / 8)``, ``v`` and ``w`` the vectors of adjacent stages.

    Args:
        g_s: maps of the student, ``[B, D_i, H_i, W_i]``, at least two.
        g_t: as many maps of the teacher.
        k: number of singular vectors; each is scaled by the teacher's singular value (normalised).
    """
    relations, losses = [], []
    for student, teacher in zip(g_s, g_t, strict=True):
        student, teacher = same_size(student, teacher)
        v_t, values = leading_vectors(teacher, k)
        v_t = (v_t * _sign(v_t.sum(1, keepdim=True))).detach()
        v_s, _ = leading_vectors(student, min(k + _SPARE, student.shape[-1]))
        cosines = (v_s.mT @ v_t).detach()
        best = cosines.abs().argmax(1, keepdim=True)
        v_s = v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * _sign(cosines.gather(1, best))
        scale = (values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)).unsqueeze(1)
        relations.append((v_s * scale, v_t * scale))
    for before, after in itertools.pairwise(relations):
        pairs = zip(after, before, strict=True)
        s, t = ((-(v.unsqueeze(2) - w.unsqueeze(1)).square() / 8).exp() for v, w in pairs)
        losses.append((s - t).square().flatten(1).sum(1).mean())
    return torch.stack(losses).sum()


@register("KDSVD")
class KDSVD(StageDistiller):
    """Distillation of the singular vectors of matched stages."""

    defaults = {"K": 1, "WARMUP": 0, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}}
    meanings = {"K": "singular vectors of each map"}
    loss = staticmethod(kdsvd_loss)
    arguments = {"k": "K"}
    capturable = False  # torch.linalg.eigh synchronises with the host

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        students, teachers = match_stages(pair.student.features, pair.teacher.features)
        width = min(each.shape[-1] for each in students + teachers)
        if len(students) < 2 or not 1 <= node.K <= width:
            got = f"{node.K} for {shapes(students)} and {shapes(teachers)}"
            raise ConfigError(f"requires two stages and 1 <= K <= their width, got {got}")
        return super().from_config(node, pair)
