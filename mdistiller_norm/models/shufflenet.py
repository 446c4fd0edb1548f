"""ShuffleNet V1 with three groups and ShuffleNet V2 of width 1, for CIFAR.

Sources: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices" (2018), with
a ReLU after the depthwise convolution; Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design" (2018). Variants and parameter names as in RepDistiller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Block, Network, Stage, conv, global_pool
from mdistiller_norm.types import Outputs

STEM, GROUPS = 24, 3


def _shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel ``g * (D / groups) + d`` to ``d * groups + g``."""
    return torch.unflatten(x, 1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    """Concatenate two halves and shuffle them, in one copy: left 0, right 0, left 1, right 1, ..."""
    return torch.stack((left, right), dim=2).flatten(1, 2)


class GroupedBlock(Block):
    """Block of V1: grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1.

    Stride 1 adds the input to the output, stride 2 concatenates the average-pooled input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, including the concatenated input.
        stride: 1, or 2 for the first block of a stage.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = out_channels if stride == 1 else out_channels - in_channels
        width = branch // 4
        self.groups = 1 if in_channels == STEM else GROUPS  # the stem has too few channels for groups
        self.conv1 = conv(in_channels, width, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, branch, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            out = _shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            out += x
            return out
        return torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), dim=1)

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        return self.bn3 if self.stride == 1 else None


class SplitBlock(Block):
    """Block of V2: 1x1, depthwise 3x3 and 1x1 on one half of the channels; the other half is unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        right = self.bn3(self.conv3(right))
        return _interleave(left, right)


class DownBlock(Block):
    """First block of a V2 stage: halves the size and computes both halves of the output from the whole input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = self.bn2(self.conv2(left))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = self.bn5(self.conv5(right))
        return _interleave(left, right)


def _v1_stage(in_channels: int, out_channels: int, depth: int) -> Stage:
    rest = (GroupedBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1))
    return Stage([GroupedBlock(in_channels, out_channels, stride=2), *rest])


def _v2_stage(in_channels: int, out_channels: int, depth: int) -> Stage:
    return Stage(
        [DownBlock(in_channels, out_channels), *(SplitBlock(out_channels) for _ in range(depth - 1))]
    )


class ShuffleNet(Network):
    """1x1 stem, three stages, and in V2 a 1x1 head.

    ``features`` are the stem and the stages after the ReLU (``pooled`` of V2 is the pooled head); ``preacts`` are the
    same maps before it, except for the stem, which is after its ReLU in both (as in mdistiller). The pre-activations of
    V2 are shuffled, so that ``relu(preact) == feature``; mdistiller's are not. Weights use PyTorch's default
    initialisation.

    Args:
        num_classes: number of classes.
        stage: creates a stage from its input channels, output channels and depth.
        widths: output channels of the stages.
        head: channels of the head, 0 for none.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        stage: Callable[[int, int, int], Stage],
        widths: tuple[int, int, int],
        head: int = 0,
    ) -> None:
        super().__init__(num_classes)
        self.head = head
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = stage(STEM, widths[0], 4)
        self.layer2 = stage(widths[0], widths[1], 8)
        self.layer3 = stage(widths[1], widths[2], 4)
        if head:
            self.conv2 = conv(widths[2], head, 1)
            self.bn2 = nn.BatchNorm2d(head)
        self.linear = nn.Linear(head or widths[2], num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        stage1, preact1 = self.layer1(stem)
        stage2, preact2 = self.layer2(stage1)
        stage3, preact3 = self.layer3(stage2)
        deepest = F.relu(self.bn2(self.conv2(stage3)), inplace=True) if self.head else stage3
        pooled = global_pool(deepest)
        logits = self.linear(pooled)
        return Outputs(logits, (stem, stage1, stage2, stage3), (stem, preact1, preact2, preact3), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        return (None, self.layer1.norm, self.layer2.norm, self.layer3.norm)


CIFAR_MODELS.register("ShuffleV1")(partial(ShuffleNet, stage=_v1_stage, widths=(240, 480, 960)))
CIFAR_MODELS.register("ShuffleV2")(partial(ShuffleNet, stage=_v2_stage, widths=(116, 232, 464), head=1024))
