"""Wide residual networks with pre-activation, for CIFAR.

Source: Zagoruyko and Komodakis, "Wide Residual Networks" (2016); parameter names as in RepDistiller.
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Network, conv, init_weights
from mdistiller_norm.types import Outputs


class PreactBlock(nn.Module):
    """Two times BN, ReLU and 3x3 convolution, plus the identity or a projection; returns the output and ``bn1(x)``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        projects = in_channels != out_channels
        self.convShortcut = conv(in_channels, out_channels, 1, stride) if projects else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.bn1(x)
        activation = F.relu(preact)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activation)), inplace=True))
        out += x if self.convShortcut is None else self.convShortcut(activation)
        return out, preact


class Group(nn.Module):
    """Blocks of one width; returns the output and the pre-activation of the group's input."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int) -> None:
        super().__init__()
        rest = (PreactBlock(out_channels, out_channels, 1) for _ in range(depth - 1))
        self.layer = nn.Sequential(PreactBlock(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, *rest = self.layer
        x, preact = first(x)
        for block in rest:
            x, _ = block(x)
        return x, preact


class WideResNet(Network):
    """Convolution, three groups, BN and ReLU.

    ``features`` are the outputs of the convolution and of the groups without an activation (as in mdistiller); they can
    be negative. ``preacts`` are the output of the convolution and, for each group, of the batch norm that follows it:
    the first of the next group or the last of the network. So ``relu(preact) != feature``. Unlike in mdistiller, each
    batch norm runs once per forward pass.

    Args:
        depth: ``6 * blocks + 4``.
        widen: multiplies the channels 16, 32 and 64 of the groups.
    """

    def __init__(self, num_classes: int, *, depth: int, widen: int) -> None:
        super().__init__(num_classes, [None, "block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"])
        blocks = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = Group(16, 16 * widen, blocks, stride=1)
        self.block2 = Group(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = Group(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_weights(self)
        nn.init.zeros_(self.fc.bias)

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.conv1(images)
        group1, _ = self.block1(stem)
        group2, preact1 = self.block2(group1)
        group3, preact2 = self.block3(group2)
        preact3 = self.bn1(group3)
        pooled = F.relu(preact3).mean((2, 3))
        features, preacts = (stem, group1, group2, group3), (stem, preact1, preact2, preact3)
        return Outputs(self.fc(pooled), features, preacts, pooled)


for _depth, _widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    CIFAR_MODELS[f"wrn_{_depth}_{_widen}"] = partial(WideResNet, depth=_depth, widen=_widen)
