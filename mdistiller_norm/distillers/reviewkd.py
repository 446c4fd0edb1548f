"""ReviewKD: each of the teacher's stages teaches a fusion of the student's stages from there on down.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021): attention based fusion (ABF, section 3.3),
hierarchical context loss (HCL, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.maps import Maps, check_typed, pool_to, require_preacts, shapes
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs

LEVELS = (4, 2, 1)
MAX_MID_CHANNELS = 512


def hcl_loss(list_s: Sequence[Tensor], list_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of maps and of their averages on a 4x4, 2x2 and 1x1 grid, summed over the maps.

    Each grid smaller than the map counts half of the level before it; weights add up to 1 for each map.

    Args:
        list_s: the student's fused maps ``[B, D_i, H_i, W_i]``.
        list_t: the teacher's, of the same shapes.

    Returns:
        A scalar in at least float32.
    """
    losses = []
    for student, teacher in zip(list_s, list_t, strict=True):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
        for level in LEVELS:
            if level < student.shape[2]:
                weight /= 2
                total += weight
                grid = (level, level)
                loss = loss + weight * F.mse_loss(pool_to(student, grid), pool_to(teacher, grid))
        losses.append(loss / total)
    return torch.stack(losses).sum()


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes a single value per channel too, by its running statistics (PyTorch's refuses it)."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D, H, W]`` to the same."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class AttentionFusion(nn.Module):
    """ABF: a student's map and what comes from the deeper ones, mixed by two spatial attention maps.

    Args:
        in_channels: of the student's map.
        mid_channels: of what is passed on.
        out_channels: of the teacher's map.
        fuse: false for the deepest, which has nothing to be mixed with.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        inner = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        outer = nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False)
        for convolution in (inner, outer):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.inner = nn.Sequential(inner, BatchNorm(mid_channels))
        self.outer = nn.Sequential(outer, BatchNorm(out_channels))
        self.attention = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            x: the student's map ``[B, in_channels, H, W]``.
            deeper: what the next deeper fusion passed on, ``[B, mid_channels, H', W']``; None for the deepest.
            size: height and width of the teacher's map.

        Returns:
            ``[B, out_channels, *size]`` to compare with the teacher, and ``[B, mid_channels, *size]`` to pass on.
        """
        x = self.inner(x)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, x.shape[-2:])
            own, others = self.attention(torch.cat([x, deeper], 1)).sigmoid().split(1, 1)
            x = own * x + others * deeper
        x = _resize(x, size)
        return self.outer(x), x


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[-2:] == tuple(size) else F.interpolate(maps, tuple(size), mode="nearest")


def _levels(maps: Maps, pooled: Tensor) -> Maps:
    """Maps and pooled features as one list, shallow to deep."""
    return (*maps, pooled[:, :, None, None])


@register("REVIEWKD")
class ReviewKD(Distiller):
    """Knowledge review.

    The teacher's stages before their ReLU (its stem is left out) and its pooled features teach as many of the
    student's maps, counted from the deepest; a map of another size is resized to the teacher's.

    Args:
        in_channels: the student's, shallow to deep, the pooled features last.
        out_channels: the teacher's, likewise.
        student_preact: read the student's maps before their ReLU.
    """

    defaults = {
        "CE_WEIGHT": 1.0,
        "REVIEWKD_WEIGHT": 1.0,
        "WARMUP_EPOCHS": 20,
        # Probed; checked where a file names them.
        "SHAPES": [1, 8, 16, 32],
        "OUT_SHAPES": [1, 8, 16, 32],
        "IN_CHANNELS": [64, 128, 256, 256],
        "OUT_CHANNELS": [64, 128, 256, 256],
        # mdistiller's files name it and its code never uses it: the middle has min(512, last of IN_CHANNELS) channels.
        "MAX_MID_CHANNEL": MAX_MID_CHANNELS,
        "STU_PREACT": False,
    }
    need = Need.MAPS

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], student_preact: bool = False, **weights: Any
    ) -> None:
        super().__init__(**weights)
        self.student_preact = student_preact
        mid_channels = min(MAX_MID_CHANNELS, in_channels[-1])
        last = len(in_channels) - 1
        channels = zip(in_channels, out_channels, strict=True)
        self.fusions = nn.ModuleList(
            AttentionFusion(ins, mid_channels, outs, fuse=level < last) for level, (ins, outs) in enumerate(channels)
        )

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> ReviewKD:
        """See :class:`Distiller`."""
        require_preacts(teacher=pair.teacher.preacts, **({"student": pair.student.preacts} if node.STU_PREACT else {}))
        students = pair.student.preacts if node.STU_PREACT else pair.student.features
        teachers = pair.teacher.preacts[1:]
        count = min(len(students), len(teachers))
        if count < 1:
            raise ConfigError(f"REVIEWKD: student maps are {shapes(students)}, teacher stages {shapes(teachers)}")
        student = _levels(students[-count:], pair.student.pooled)
        teacher = _levels(teachers[-count:], pair.teacher.pooled)
        for sizes, channels, levels in (("SHAPES", "IN_CHANNELS", student), ("OUT_SHAPES", "OUT_CHANNELS", teacher)):
            probed = {sizes: [level.shape[2] for level in levels[::-1]], channels: [level.shape[1] for level in levels]}
            for key, value in probed.items():
                check_typed(f"REVIEWKD.{key}", getattr(node, key), cls.defaults[key], value)
        return cls(
            [level.shape[1] for level in student],
            [level.shape[1] for level in teacher],
            bool(node.STU_PREACT),
            ce_weight=node.CE_WEIGHT,
            weight=node.REVIEWKD_WEIGHT,
            warmup=node.WARMUP_EPOCHS,
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        count = len(self.fusions) - 1
        maps = student.preacts if self.student_preact else student.features
        sources = _levels(maps[-count:], student.pooled)
        targets = _levels(teacher.preacts[-count:], teacher.pooled)
        fused: list[Tensor] = []
        deeper = None
        for fusion, source, target in zip(list(self.fusions)[::-1], sources[::-1], targets[::-1], strict=True):
            out, deeper = fusion(source, deeper, target.shape[-2:])
            fused.insert(0, out)
        return hcl_loss(fused, targets)
