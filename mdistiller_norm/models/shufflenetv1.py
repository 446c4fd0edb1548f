"""ShuffleNet V1 with three groups, for CIFAR.

Source: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices" (2018); the
variant with a ReLU after the depthwise convolution, and its parameter names, as in RepDistiller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Block, Network, Stage, conv, global_pool
from mdistiller_norm.types import Outputs

STEM, GROUPS = 24, 3


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups: channel ``g * (D / groups) + d`` moves to ``d * groups + g``."""
    return torch.unflatten(x, 1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleBlock(Block):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1; the input is added, or concatenated after stride 2.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, those of the concatenated input included.
        stride: 1, or 2 for the block that begins a stage.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = out_channels if stride == 1 else out_channels - in_channels
        width = branch // 4
        self.groups = 1 if in_channels == STEM else GROUPS  # the stem has too few channels to be grouped
        self.conv1 = conv(in_channels, width, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, branch, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        """The pre-activation of the block's output."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            out += x
            return out
        return torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), dim=1)

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """See :class:`Block`."""
        return self.bn3 if self.stride == 1 else None


def _stage(in_channels: int, out_channels: int, depth: int) -> Stage:
    first = ShuffleBlock(in_channels, out_channels, stride=2)
    return Stage([first, *(ShuffleBlock(out_channels, out_channels, stride=1) for _ in range(depth - 1))])


class ShuffleNetV1(Network):
    """A 1x1 stem, then three stages.

    ``features`` are the stem and the stages after the ReLU; ``preacts`` the same before it, except that the stem
    appears after its ReLU in both, as in mdistiller. Weights start as PyTorch's defaults.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, 240, depth=4)
        self.layer2 = _stage(240, 480, depth=8)
        self.layer3 = _stage(480, 960, depth=4)
        self.linear = nn.Linear(960, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`."""
        stem = F.relu(self.bn1(self.conv1(images)), inplace=True)
        stage1, preact1 = self.layer1(stem)
        stage2, preact2 = self.layer2(stage1)
        stage3, preact3 = self.layer3(stage2)
        pooled = global_pool(stage3)
        logits = self.linear(pooled)
        return Outputs(logits, (stem, stage1, stage2, stage3), (stem, preact1, preact2, preact3), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`."""
        return (None, self.layer1.norm, self.layer2.norm, self.layer3.norm)


CIFAR_MODELS.register("ShuffleV1")(ShuffleNetV1)
