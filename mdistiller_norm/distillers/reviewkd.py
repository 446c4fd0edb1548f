"""ReviewKD: each stage of the teacher guides a fusion of the student's stages from there on.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021): attention based fusion (ABF, section 3.3)
and hierarchical context loss (HCL, section 3.4).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import (
    Distiller,
    Need,
    Pair,
    at_least_float32,
    loss_weights,
    register,
)
from mdistiller_norm.distillers.common import (
    BatchNorm,
    Maps,
    check_typed,
    pool_to,
    require_preacts,
    shapes,
)
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs

LEVELS = (4, 2, 1)


def hcl_loss(list_s: Sequence[Tensor], list_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of maps and of their averages on 4x4, 2x2 and 1x1 grids, summed over the maps.

    Each smaller grid has half the weight of the level before it; the weights of a map sum to 1.

    Args:
        list_s: fused maps of the student, ``[B, D_i, H_i, W_i]``.
        list_t: maps of the teacher, of the same shapes.
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


class AttentionFusion(nn.Module):
    """ABF: mixes a map of the student with the fusion of the deeper ones by two spatial attention maps.

    Channels are those of the student's, the fused and the teacher's map; the deepest map has nothing to fuse.
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
        """Return the map to compare with the teacher's and the fused map for the next level, both of ``size``."""
        x = self.inner(x)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, x.shape[-2:])
            this, other = self.attention(torch.cat([x, deeper], 1)).sigmoid().split(1, 1)
            x = this * x + other * deeper
        x = _resize(x, size)
        return self.outer(x), x


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[-2:] == tuple(size) else F.interpolate(maps, tuple(size), mode="nearest")


def _levels(maps: Maps, pooled: Tensor) -> Maps:
    return (*maps, pooled[:, :, None, None])


@register("REVIEWKD")
class ReviewKD(Distiller):
    """Knowledge review of the teacher's stages before their ReLU and of its pooled features.

    They are matched with as many maps of the student, from the deepest; those are resized to the teacher's.
    """

    # The four lists are probed, and checked if a config contains them. MAX_MID_CHANNEL is unused, as in mdistiller.
    defaults = {
        "CE_WEIGHT": 1.0, "REVIEWKD_WEIGHT": 1.0, "WARMUP_EPOCHS": 20, "STU_PREACT": False, "MAX_MID_CHANNEL": 512,
        "SHAPES": [1, 8, 16, 32], "OUT_SHAPES": [1, 8, 16, 32],
        "IN_CHANNELS": [64, 128, 256, 256], "OUT_CHANNELS": [64, 128, 256, 256],
    }  # fmt: skip
    meanings = {
        "REVIEWKD_WEIGHT": "weight of the distillation loss",
        "WARMUP_EPOCHS": "epochs of the linear warm-up of the distillation loss",
        "STU_PREACT": "use the student's maps before their activation", "MAX_MID_CHANNEL": "not used",
        "SHAPES": "probed; checked if it is set", "OUT_SHAPES": "probed; checked if it is set",
        "IN_CHANNELS": "probed; checked if it is set", "OUT_CHANNELS": "probed; checked if it is set",
    }  # fmt: skip
    need = Need.MAPS

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        student_preact: bool,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.student_preact = student_preact
        mid_channels = min(512, in_channels[-1])
        self.fusions = nn.ModuleList(
            AttentionFusion(ins, mid_channels, outs, fuse=level < len(in_channels) - 1)
            for level, (ins, outs) in enumerate(zip(in_channels, out_channels, strict=True))
        )

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        require_preacts(teacher=pair.teacher.preacts)
        students = pair.student.preacts if node.STU_PREACT else pair.student.features
        if node.STU_PREACT:
            require_preacts(student=students)
        teachers = pair.teacher.preacts[1:]
        count = min(len(students), len(teachers))
        if count < 1:
            raise ConfigError(
                f"REVIEWKD requires at least one stage, got student maps {shapes(students)} and teacher stages "
                f"{shapes(teachers)}"
            )
        channels = []
        for maps, pooled, keys in (
            (students, pair.student.pooled, ("SHAPES", "IN_CHANNELS")),
            (teachers, pair.teacher.pooled, ("OUT_SHAPES", "OUT_CHANNELS")),
        ):
            levels = _levels(maps[-count:], pooled)
            probed = [level.shape[2] for level in levels[::-1]], [level.shape[1] for level in levels]
            for key, value in zip(keys, probed, strict=True):
                check_typed(f"REVIEWKD.{key}", node[key], cls.defaults[key], value)
            channels.append(probed[1])
        weights = loss_weights(node) | {"weight": node.REVIEWKD_WEIGHT, "warmup": node.WARMUP_EPOCHS}
        return cls(channels[0], channels[1], bool(node.STU_PREACT), **weights)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        count = len(self.fusions) - 1
        maps = student.preacts if self.student_preact else student.features
        sources = _levels(maps[-count:], student.pooled)
        targets = _levels(teacher.preacts[-count:], teacher.pooled)
        fused: list[Tensor] = []
        deeper = None
        for fusion, source, target in reversed(list(zip(self.fusions, sources, targets, strict=True))):
            out, deeper = fusion(source, deeper, target.shape[-2:])
            fused.insert(0, out)
        return hcl_loss(fused, targets)
