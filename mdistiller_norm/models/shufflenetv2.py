"""ShuffleNet V2 of width 1, for CIFAR.

Source: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (2018); parameter names
as in RepDistiller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Block, Network, Stage, conv, global_pool
from mdistiller_norm.types import Outputs

STEM, HEAD = 24, 1024


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    """Concatenation and channel shuffle of two halves in one copy: left 0, right 0, left 1, right 1, ..."""
    return torch.stack((left, right), dim=2).flatten(1, 2)


class _HalfNormBlock(Block):
    """Its batch norms see half of the output's channels, so that none stands for the whole."""

    @property
    def norm(self) -> None:
        """See :class:`Block`."""
        return None


class BasicBlock(_HalfNormBlock):
    """One half of the channels passes through 1x1, depthwise 3x3 and 1x1; the other stays as it is."""

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
        """The pre-activation of the block's output; the half that stays has been through a ReLU already."""
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        right = self.bn3(self.conv3(right))
        return _interleave(left, right)


class DownBlock(_HalfNormBlock):
    """Halves the size: both halves of the output are computed from the whole input."""

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
        """The pre-activation of the block's output."""
        left = self.bn1(self.conv1(x))
        left = self.bn2(self.conv2(left))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = self.bn5(self.conv5(right))
        return _interleave(left, right)


def _stage(in_channels: int, out_channels: int, depth: int) -> Stage:
    return Stage([DownBlock(in_channels, out_channels), *(BasicBlock(out_channels) for _ in range(depth - 1))])


class ShuffleNetV2(Network):
    """A 1x1 stem, three stages, a 1x1 head.

    ``features`` are the stem and the stages after the ReLU (``pooled`` is of the head, not of the last of them);
    ``preacts`` the same before it, except that the stem appears after its ReLU in both, as in mdistiller. mdistiller
    leaves its pre-activations unshuffled; here they are shuffled, so that ``relu(preact) == feature``. Weights start as
    PyTorch's defaults.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, 116, depth=4)
        self.layer2 = _stage(116, 232, depth=8)
        self.layer3 = _stage(232, 464, depth=4)
        self.conv2 = conv(464, HEAD, 1)
        self.bn2 = nn.BatchNorm2d(HEAD)
        self.linear = nn.Linear(HEAD, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`."""
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        stage1, preact1 = self.layer1(stem)
        stage2, preact2 = self.layer2(stage1)
        stage3, preact3 = self.layer3(stage2)
        pooled = global_pool(F.relu(self.bn2(self.conv2(stage3)), inplace=True))
        logits = self.linear(pooled)
        return Outputs(logits, (stem, stage1, stage2, stage3), (stem, preact1, preact2, preact3), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`; no norm covers a whole map."""
        return (None, None, None, None)


CIFAR_MODELS.register("ShuffleV2")(ShuffleNetV2)
