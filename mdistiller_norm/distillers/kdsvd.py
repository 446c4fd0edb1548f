"""KDSVD: how the leading singular vectors of a stage relate to those of the stage before it.

Source: Lee et al., "Self-Supervised Knowledge Distillation Using Singular Value Decomposition" (ECCV 2018).
The paper decomposes a map as ``[H * W, D]``, and so does RepDistiller. mdistiller decomposes it as ``[D * H, W]``, so
the vectors run over the columns of the image: that is what is computed here, with three repairs.
The sign of a singular vector is arbitrary and changes the loss: the teacher's components sum to something positive, and
the student's follow the teacher's. The gradient is finite for equal and for zero singular values. Where the two maps
differ in size, the larger is averaged down (mdistiller stops with an error).

``torch.linalg.eigh`` waits for the device on CUDA: this method's step cannot be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.maps import matched_stages, same_size, shapes
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs

# Eigenvalues closer than this, relative to the largest, are taken for equal: no gradient turns one into the other.
_GAP = 1e-6
# How many more vectors of the student are candidates for each of the teacher's.
_SPARE = 3


def leading_vectors(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The right singular vectors of ``[B, D, H, W]`` as ``[D * H, W]`` that belong to the largest singular values.

    Returns:
        Vectors ``[B, W, count]``, largest first, and their singular values ``[B, count]`` (without gradient, relative
        to the map's largest element). A vector whose singular value is 0 is not determined by the map: it is 0.
    """
    rows = at_least_float32(maps).flatten(1, 2)
    peak = rows.detach().abs().amax((1, 2), keepdim=True)
    rows = rows / peak.masked_fill(peak == 0, 1)
    gram = rows.mT @ rows
    with torch.no_grad():
        # Rather a loss that is not finite, which the trainer names, than an error from inside the solver.
        values, basis = torch.linalg.eigh(gram.nan_to_num())
        top, vectors = values[:, -count:].flip(1), basis[..., -count:].flip(2)
        floor = _GAP * values[:, -1:].clamp_min(1e-6)
        vectors = vectors * (top > floor).unsqueeze(1)
        gap = top.unsqueeze(1) - values.unsqueeze(2)
        rate = gap / (gap.square() + floor.unsqueeze(2).square())
    # The first-order change of the eigenvectors: zero in value, and their derivative.
    change = basis @ (rate * (basis.mT @ (gram - gram.detach()) @ vectors))
    return vectors + change, top.clamp_min(0).sqrt()


def _sign(x: Tensor) -> Tensor:
    """1 or -1, also for 0."""
    return 1 - 2 * (x < 0).to(x.dtype)


def _aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors the student's candidate most parallel to it, in the same direction."""
    cosines = (student.mT @ teacher).detach()
    best = cosines.abs().argmax(1, keepdim=True)
    chosen = student.gather(2, best.expand(-1, student.shape[1], -1))
    return chosen * _sign(cosines.gather(1, best))


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int = 1) -> Tensor:
    """Squared difference of ``exp(-(v_i - w_j)^2 / 8)``, ``v`` and ``w`` the vectors of adjacent stages.

    Summed over the elements of the vectors and over the stages, averaged over the batch.

    Args:
        g_s: the student's maps ``[B, D_i, H_i, W_i]``, at least two.
        g_t: the teacher's, as many.
        k: how many singular vectors; each is multiplied by the teacher's singular value (their squares sum to 1).

    Returns:
        A scalar in at least float32.
    """
    relations, losses = [], []
    for student, teacher in zip(g_s, g_t, strict=True):
        student, teacher = same_size(student, teacher)
        v_t, values = leading_vectors(teacher, k)
        v_t = (v_t * _sign(v_t.sum(1, keepdim=True))).detach()
        v_s, _ = leading_vectors(student, min(k + _SPARE, student.shape[-1]))
        scale = values / values.norm(dim=1, keepdim=True).clamp_min(1e-12)
        relations.append((_aligned(v_s, v_t) * scale.unsqueeze(1), v_t * scale.unsqueeze(1)))
    for before, after in itertools.pairwise(relations):
        s, t = ((-(v.unsqueeze(2) - w.unsqueeze(1)).square() / 8).exp() for v, w in zip(after, before, strict=True))
        losses.append((s - t).square().flatten(1).sum(1).mean())
    return torch.stack(losses).sum()


@register("KDSVD")
class KDSVD(Distiller):
    """Distillation of singular vectors of the stages (:mod:`~mdistiller_norm.distillers.maps` says which meet)."""

    defaults = {"K": 1, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}}
    need = Need.MAPS
    capturable = False  # eigenvalues are computed with a look at the host

    def __init__(self, k: int = 1, **weights: Any) -> None:
        super().__init__(**weights)
        self.k = k

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> KDSVD:
        """See :class:`Distiller`."""
        students, teachers = matched_stages(pair.student.features, pair.teacher.features)
        both = f"student maps are {shapes(students)}, teacher maps {shapes(teachers)}"
        if len(students) < 2:
            raise ConfigError(f"KDSVD compares adjacent stages and needs two: {both}")
        width = min(maps.shape[-1] for maps in students + teachers)
        if not 1 <= node.K <= width:
            raise ConfigError(f"KDSVD.K is {node.K}, not between 1 and the smallest width, {width}: {both}")
        return cls(node.K, ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.FEAT_WEIGHT)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        return kdsvd_loss(*matched_stages(student.features, teacher.features), self.k)
