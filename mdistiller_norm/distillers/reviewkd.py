"""ReviewKD: each stage of the teacher guides a fusion of the student's stages from there on.

Source: Chen et al., "Distilling Knowledge via Knowledge Review" (CVPR 2021): attention based fusion (ABF, section 3.3)
and hierarchical context loss (HCL, section 3.4).
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair, loss_weights, register
from mdistiller_norm.distillers.common import BatchNorm, check_typed, need_preacts, pool_to
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32

LEVELS = (4, 2, 1)
_SHAPES = ("SHAPES", "OUT_SHAPES", "IN_CHANNELS", "OUT_CHANNELS")


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

    def __init__(self, in_channels: int, width: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        inner = nn.Conv2d(in_channels, width, 1, bias=False)
        outer = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        for convolution in (inner, outer):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.inner = nn.Sequential(inner, BatchNorm(width))
        self.outer = nn.Sequential(outer, BatchNorm(out_channels))
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuse else None

    def forward(
        self, x: Tensor, deeper: Tensor | None, size: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Return the map to compare with the teacher's and the fused map for the next level, both of ``size``."""
        x = self.inner(x)
        if self.attention is not None and deeper is not None:
            deeper = _resize(deeper, x.shape[-2:])
            this, other = self.attention(torch.cat([x, deeper], 1)).sigmoid().split(1, 1)
            x = this * x + other * deeper
        x = _resize(x, size)
        return self.outer(x), x


def _resize(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="nearest")


def _levels(maps: Sequence[Tensor], pooled: Tensor) -> list[Tensor]:
    return [*maps, pooled[:, :, None, None]]


@register("REVIEWKD")
class ReviewKD(Distiller):
    """Knowledge review of the teacher's stages before their ReLU and of its pooled features.

    They are matched with as many maps of the student, from the deepest; those are resized to the teacher's.
    """

    defaults = {
        "CE_WEIGHT": 1.0,
        "REVIEWKD_WEIGHT": 1.0,
        "WARMUP_EPOCHS": 20,
        "STU_PREACT": False,
        "MAX_MID_CHANNEL": 512,
        "SHAPES": [1, 8, 16, 32],
        "OUT_SHAPES": [1, 8, 16, 32],
        "IN_CHANNELS": [64, 128, 256, 256],
        "OUT_CHANNELS": [64, 128, 256, 256],
    }
    meanings = {
        "REVIEWKD_WEIGHT": "weight of the distillation loss",
        "WARMUP_EPOCHS": "epochs of the linear warm-up of the distillation loss",
        "STU_PREACT": "use the student's maps before their activation",
        "MAX_MID_CHANNEL": "not used",
        **dict.fromkeys(_SHAPES, "probed; checked if it is set"),
    }
    need = Need.MAPS

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        preact: bool,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.preact, width = preact, min(512, in_channels[-1])
        self.fusions = nn.ModuleList(
            AttentionFusion(
                channels, width, out_channels[level], fuse=level < len(in_channels) - 1
            )
            for level, channels in enumerate(in_channels)
        )

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        need_preacts("teacher", pair.teacher.preacts)
        students = pair.student.preacts if node.STU_PREACT else pair.student.features
        if node.STU_PREACT:
            need_preacts("student", students)
        teachers = pair.teacher.preacts[1:]
        if not teachers:
            raise ConfigError("the teacher requires a stage besides its stem")
        count = min(len(students), len(teachers))
        sources = _levels(students[-count:], pair.student.pooled)
        targets = _levels(teachers[-count:], pair.teacher.pooled)
        sizes = [[level.shape[2] for level in side[::-1]] for side in (sources, targets)]
        in_channels, out_channels = (
            [level.shape[1] for level in side] for side in (sources, targets)
        )
        for key, value in zip(_SHAPES, [*sizes, in_channels, out_channels], strict=True):
            check_typed(f"REVIEWKD.{key}", node[key], cls.defaults[key], value)
        return cls(in_channels, out_channels, node.STU_PREACT, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        count = len(self.fusions) - 1
        maps = student.preacts if self.preact else student.features
        sources = _levels(maps[-count:], student.pooled)
        targets = _levels(teacher.preacts[-count:], teacher.pooled)
        fused: list[Tensor] = []
        deeper = None
        levels = zip(self.fusions, sources, targets, strict=True)
        for fusion, source, target in reversed([*levels]):
            out, deeper = fusion(source, deeper, target.shape[-2:])
            fused.insert(0, out)
        return hcl_loss(fused, targets)
