"""ShuffleNet V1 with three groups and ShuffleNet V2 of width 1, for CIFAR.

Sources: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices" (2018), with
a ReLU after the depthwise convolution; Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design" (2018). Variants and parameter names as in RepDistiller.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Network, Stage, conv_bn
from mdistiller_norm.types import Outputs

STEM, GROUPS = 24, 3
DEPTHS = (4, 8, 4)


def _interleave(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack((left, right), dim=2).flatten(1, 2)


class GroupedBlock(nn.Module):
    """Block of V1: grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1.

    With equal channels it adds the input to the output. Otherwise it is the first block of a stage: it halves the size
    and concatenates the average-pooled input.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = in_channels != out_channels
        branch = out_channels - in_channels if self.first else out_channels
        width = branch // 4
        # The stem has too few channels for groups.
        self.groups = 1 if in_channels == STEM else GROUPS
        self.conv1, self.bn1 = conv_bn(in_channels, width, 1, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(width, width, 3, 2 if self.first else 1, groups=width)
        self.conv3, self.bn3 = conv_bn(width, branch, 1, groups=GROUPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:  # shuffle
            out = torch.unflatten(out, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)), inplace=True)))
        if self.first:
            return torch.cat((out, F.avg_pool2d(x, 3, stride=2, padding=1)), dim=1)
        out += x
        return out


class DownBlock(nn.Module):
    """First block of a V2 stage: halves the size and computes both halves of the output from the whole input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = conv_bn(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.conv2, self.bn2 = conv_bn(in_channels, half, 1)
        self.conv3, self.bn3 = conv_bn(in_channels, half, 1)
        self.conv4, self.bn4 = conv_bn(half, half, 3, stride=2, groups=half)
        self.conv5, self.bn5 = conv_bn(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        return _interleave(left, right)


class SplitBlock(nn.Module):
    """Other blocks of V2: 1x1, depthwise 3x3 and 1x1 on one half of the channels; the other half is unchanged."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = conv_bn(half, half, 1)
        self.conv2, self.bn2 = conv_bn(half, half, 3, groups=half)
        self.conv3, self.bn3 = conv_bn(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn3(self.conv3(self.bn2(self.conv2(right))))
        return _interleave(left, right)


class ShuffleNet(Network):
    """1x1 stem, three stages, and in V2 a 1x1 head.

    ``features`` are the stem and the stages after the ReLU (``pooled`` of V2 is the pooled head); ``preacts`` are the
    same maps before it, except for the stem, which is after its ReLU in both (as in mdistiller). The pre-activations of
    V2 are shuffled, so that ``relu(preact) == feature``; mdistiller's are not, and no norm covers all their channels.
    Weights use PyTorch's default initialisation.

    Args:
        first: creates the first block of a stage from its input and output channels.
        rest: creates the other blocks.
        widths: output channels of the stages.
        head: channels of the head, 0 for none.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        first: Callable[[int, int], nn.Module],
        rest: Callable[[int, int], nn.Module],
        widths: tuple[int, int, int],
        head: int = 0,
    ) -> None:
        ends = [f"layer{stage}.{depth - 1}" for stage, depth in enumerate(DEPTHS, 1)]
        super().__init__(num_classes, [None, *(None if head else f"{end}.bn3" for end in ends)])
        self.head = head
        self.conv1, self.bn1 = conv_bn(3, STEM, 1)
        channels = STEM
        for stage, (depth, width) in enumerate(zip(DEPTHS, widths, strict=True), 1):
            blocks = (rest(width, width) for _ in range(depth - 1))
            self.add_module(f"layer{stage}", Stage(first(channels, width), *blocks))
            channels = width
        if head:
            self.conv2, self.bn2 = conv_bn(channels, head, 1)
        self.linear = nn.Linear(head or channels, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        features, preacts = [x], [x]
        for stage in ("layer1", "layer2", "layer3"):
            x, preact = self.get_submodule(stage)(x)
            features.append(x)
            preacts.append(preact)
        if self.head:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        pooled = x.mean((2, 3))
        return Outputs(self.linear(pooled), tuple(features), tuple(preacts), pooled)


CIFAR_MODELS["ShuffleV1"] = partial(
    ShuffleNet, first=GroupedBlock, rest=GroupedBlock, widths=(240, 480, 960)
)
CIFAR_MODELS["ShuffleV2"] = partial(
    ShuffleNet, first=DownBlock, rest=SplitBlock, widths=(116, 232, 464), head=1024
)
