"""OFD: the student's pre-activations follow the teacher's where they matter.

Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation" (ICCV 2019): margin ReLU (Eq. 1-2), margins from
the teacher's batch norms (section 3.1), partial L2 distance (Eq. 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.distillers.base import Distiller, Need, Pair, at_least_float32, register
from mdistiller_norm.distillers.maps import matched_stages, pool_to, require_preacts, shape
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs


def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Partial squared distance to ``max(target, margin)``: sum over channels and pixels, mean over the batch.

    Where the teacher's value is not positive, the student only has to be no greater.

    Args:
        source: the student's pre-activations ``[B, D, H, W]``.
        target: the teacher's, of the same shape.
        margin: broadcastable to them, not positive: ``[1, D, 1, 1]``.

    Returns:
        A scalar in at least float32.
    """
    source, target = at_least_float32(source), at_least_float32(target)
    target = torch.maximum(target, margin.to(target))
    counts = (source > target) | (target > 0)
    return (source - target).where(counts, 0.0).pow(2).sum() / len(source)


def margins_of(norm: nn.BatchNorm2d) -> Tensor:
    """Margin of each channel: the mean of its negative values, if they follow ``N(bias, |weight|)``.

    It is ``-3 * |weight|`` where values are negative with a probability of 0.001 or less. A weight of zero makes the
    channel a constant: the margin is that constant if it is negative, else 0.

    Args:
        norm: with affine parameters, of D channels.

    Returns:
        ``[1, D, 1, 1]``, float32, not positive.
    """
    mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    ratio = mean / deviation
    probability = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.pow(2) / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(probability > 0.001, mean - deviation * density / probability, -3 * deviation)
    return margin.float().reshape(1, -1, 1, 1)


def make_connector(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Sequential:
    """Convolution without bias and batch norm, from the student's channels to the teacher's at the same size."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


@register("OFD")
class OFD(Distiller):
    """Overhaul of feature distillation on the stages' pre-activations.

    The teacher's maps are averaged to the student's size; a stage counts half of the next deeper one.
    :mod:`~mdistiller_norm.distillers.maps` says which stages meet.

    Args:
        student_channels: of the stages that are compared, shallow to deep.
        norms: the teacher's batch norms before the ReLU of those stages.
        kernel_size: of the connectors, odd.
        teacher_train_mode: run the teacher with batch statistics, as the authors do on purpose (its running statistics
            drift then, here those of a copy). Loss values differ a lot between the two modes.
    """

    defaults = {
        "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.001},
        "CONNECTOR": {"KERNEL_SIZE": 1},
        "TEACHER_TRAIN_MODE": False,
    }
    need = Need.MAPS

    def __init__(
        self,
        student_channels: Sequence[int],
        norms: Sequence[nn.BatchNorm2d],
        kernel_size: int = 1,
        teacher_train_mode: bool = False,
        **weights: Any,
    ) -> None:
        super().__init__(**weights)
        self.teacher_in_train_mode = teacher_train_mode
        widths = zip(student_channels, (norm.num_features for norm in norms), strict=True)
        self.connectors = nn.ModuleList(make_connector(ins, outs, kernel_size) for ins, outs in widths)
        for stage, norm in enumerate(norms):
            self.register_buffer(f"margin{stage}", margins_of(norm))

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> OFD:
        """See :class:`Distiller`."""
        kernel_size = node.CONNECTOR.KERNEL_SIZE
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"OFD.CONNECTOR.KERNEL_SIZE is {kernel_size}: it must be odd to keep the maps' size")
        require_preacts(student=pair.student.preacts, teacher=pair.teacher.preacts)
        students, teachers = matched_stages(pair.student.preacts, pair.teacher.preacts)
        norms = []
        before_relu: Sequence[nn.BatchNorm2d | None] = pair.teacher_network.norms_before_relu()  # type: ignore[operator]
        # A wrapped network may name no norms at all.
        for student, teacher, norm in zip_longest(students, teachers, before_relu[-len(teachers) :]):
            if norm is None or norm.num_features != teacher.shape[1]:
                raise ConfigError(
                    f"OFD cannot find its margins: the teacher's map {shape(teacher)}, which the student's "
                    f"{shape(student)} meets, has no batch norm before its ReLU; choose another teacher or method"
                )
            norms.append(norm)
        return cls(
            [student.shape[1] for student in students],
            norms,
            kernel_size,
            bool(node.TEACHER_TRAIN_MODE),
            ce_weight=node.LOSS.CE_WEIGHT,
            weight=node.LOSS.FEAT_WEIGHT,
        )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """See :class:`Distiller`."""
        students, teachers = matched_stages(student.preacts, teacher.preacts)
        losses = []
        for stage, (connector, source, target) in enumerate(zip(self.connectors, students, teachers, strict=True)):
            loss = feat_loss(connector(source), pool_to(target, source.shape[-2:]), self.get_buffer(f"margin{stage}"))
            losses.append(loss / 2 ** (len(students) - 1 - stage))
        return torch.stack(losses).sum()
