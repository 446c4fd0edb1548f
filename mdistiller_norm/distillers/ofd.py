"""OFD: partial distance between the pre-activations of student and teacher.

Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019): margin ReLU (Eq. 1-2), margins from
the teacher's batch norms (section 3.1), partial L2 distance (Eq. 4).
"""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Need, Pair, loss_weights, register
from mdistiller_norm.distillers.common import BatchNorm, match_stages, need_preacts, pool_to
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32


def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance to ``max(target, margin)``, summed over channels and pixels, averaged over the batch.

    Where the teacher's value is not positive, smaller values of the student do not count.

    Args:
        source: pre-activations of the student, ``[B, D, H, W]``.
        target: pre-activations of the teacher, of the same shape.
        margin: not positive, broadcastable to them: ``[1, D, 1, 1]``.
    """
    source, target = at_least_float32(source), at_least_float32(target)
    target = torch.maximum(target, margin.to(target))
    counts = (source > target) | (target > 0)
    return (source - target).where(counts, 0.0).pow(2).sum() / len(source)


def margins_of(norm: nn.BatchNorm2d) -> Tensor:
    """Compute the margins ``[1, D, 1, 1]``: the mean negative value of each channel, distributed as N(bias, |weight|).

    The margin is ``-3 * |weight|`` if negative values have a probability of at most 0.001. For a weight of zero it is
    ``min(bias, 0)``.
    """
    mean, std = norm.bias.detach().double(), norm.weight.detach().double().abs()
    ratio = mean / std
    probability = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.pow(2) / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(probability > 0.001, mean - std * density / probability, -3 * std)
    return margin.float().reshape(1, -1, 1, 1)


def _connector(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
    )
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, BatchNorm(out_channels))


@register("OFD")
class OFD(Distiller):
    """Overhaul of feature distillation on the pre-activations of matched stages.

    The teacher's maps are averaged to the student's size; each stage has half the weight of the next deeper one.
    """

    defaults = {
        "CONNECTOR": {"KERNEL_SIZE": 1},
        "TEACHER_TRAIN_MODE": False,
        "WARMUP": 0,
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.001},
    }
    meanings = {
        "CONNECTOR.KERNEL_SIZE": "kernel size of the connectors",
        "TEACHER_TRAIN_MODE": "run the teacher with batch statistics",
    }
    need = Need.MAPS

    def __init__(
        self,
        channels: Sequence[int],
        norms: Sequence[nn.BatchNorm2d],
        kernel_size: int = 1,
        teacher_train_mode: bool = False,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.teacher_in_train_mode = teacher_train_mode
        self.connectors = nn.ModuleList()
        for stage, (in_channels, norm) in enumerate(zip(channels, norms, strict=True)):
            self.connectors.append(_connector(in_channels, norm.num_features, kernel_size))
            self.register_buffer(f"margin{stage}", margins_of(norm))

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        kernel_size = node.CONNECTOR.KERNEL_SIZE
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(
                f"OFD.CONNECTOR.KERNEL_SIZE must be odd and >= 1, got {kernel_size}"
            )
        need_preacts("student", pair.student.preacts)
        need_preacts("teacher", pair.teacher.preacts)
        students, teachers = match_stages(pair.student.preacts, pair.teacher.preacts)
        norms: Any = pair.teacher_network.norms_before_relu()[-len(teachers) :]  # type: ignore[operator]
        # A wrapped network may return no norms at all.
        for maps, norm in zip_longest(teachers, norms):
            count = norm.num_features if isinstance(norm, nn.BatchNorm2d) and norm.affine else 0
            if count != (n := maps.shape[1]):
                raise ConfigError(f"norms_before_relu has no affine BatchNorm2d of {n} channels")
        channels = [student.shape[1] for student in students]
        return cls(channels, norms, kernel_size, node.TEACHER_TRAIN_MODE, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        students, teachers = match_stages(student.preacts, teacher.preacts)
        losses = []
        for stage, connector in enumerate(self.connectors):
            source, margin = students[stage], self.get_buffer(f"margin{stage}")
            loss = feat_loss(
                connector(source), pool_to(teachers[stage], source.shape[-2:]), margin
            )
            losses.append(loss / 2 ** (len(students) - 1 - stage))
        return torch.stack(losses).sum()
