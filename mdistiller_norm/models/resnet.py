"""Residual networks for CIFAR, with three stages (resnet8 ... resnet32x4) or four (ResNet18 ...), and for ImageNet.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016). Bottlenecks have the stride in the 3x3
convolution, as in torchvision. Parameter names match the public checkpoints: RepDistiller's and mdistiller's for CIFAR,
torchvision's for ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import (
    CIFAR_MODELS,
    IMAGENET_MODELS,
    Block,
    Network,
    Stage,
    conv,
    global_pool,
    init_convs,
)
from mdistiller_norm.types import Outputs


class ResidualBlock(Block):
    """Base of the two blocks: adds the identity, projected if the block changes the shape."""

    expansion = 1

    def _add_projection(self, name: str, in_channels: int, out_channels: int, stride: int) -> None:
        """Register the projection; call it last, because checkpoints store it after the convolutions."""
        self.projection = name if stride != 1 or in_channels != out_channels else ""
        if self.projection:
            projection = nn.Sequential(
                conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )
            self.add_module(self.projection, projection)

    def identity(self, x: Tensor) -> Tensor:
        """Return ``x`` or its projection."""
        return self.get_submodule(self.projection)(x) if self.projection else x


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions.

    Args:
        in_channels: channels of the input.
        width: inner channels; the output has ``width * expansion``.
        stride: stride of the block.
        projection: parameter name of the projection.
    """

    def __init__(self, in_channels: int, width: int, stride: int, projection: str) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self._add_projection(projection, in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.identity(x)
        return out

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions; same arguments as :class:`BasicBlock`."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, projection: str) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self._add_projection(projection, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.identity(x)
        return out

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self.bn3


class ResNet(Network):
    """Stem and stages; every stage but the first halves the size.

    ``features`` are the stem and the end of each stage after the ReLU; ``preacts`` are the same maps before it, except
    for the stem of a CIFAR network, which is after its ReLU in both (as in mdistiller).

    Args:
        num_classes: number of classes.
        block: class of the blocks.
        depths: number of blocks of each stage.
        widths: channels of each stage, before the block's expansion.
        stem_width: channels of the stem.
        large_images: use ImageNet's stem (7x7, stride 2, max-pooling) instead of CIFAR's (3x3, stride 1).
        projection: parameter name of the projections.
        classifier: parameter name of the classifier.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        large_images: bool = False,
        projection: str = "downsample",
        classifier: str = "fc",
    ) -> None:
        super().__init__(num_classes)
        self.large_images = large_images
        self.stages = tuple(f"layer{number}" for number in range(1, len(depths) + 1))
        self.classifier = classifier

        self.conv1 = conv(3, stem_width, 7, stride=2) if large_images else conv(3, stem_width, 3)
        self.bn1 = nn.BatchNorm2d(stem_width)
        channels = stem_width
        for stage, depth, width in zip(self.stages, depths, widths, strict=True):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage != "layer1" else 1
                blocks.append(block(channels, width, stride, projection))
                channels = width * block.expansion
            self.add_module(stage, Stage(blocks))
        self.add_module(classifier, nn.Linear(channels, num_classes))
        init_convs(self)

    def outputs(self, images: Tensor) -> Outputs:
        preact = self.bn1(self.conv1(images))
        x = F.relu(preact, inplace=not self.large_images)
        features, preacts = [x], [preact if self.large_images else x]
        if self.large_images:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in self.stages:
            x, preact = self.get_submodule(stage)(x)
            features.append(x)
            preacts.append(preact)
        pooled = global_pool(x)
        logits = self.get_submodule(self.classifier)(pooled)
        return Outputs(logits, tuple(features), tuple(preacts), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        return (None, *(getattr(self, stage).norm for stage in self.stages))


# CIFAR with three stages: the depth in the name is 6 * blocks + 2; "x4" networks are four times as wide.
for _depth in (8, 14, 20, 32, 44, 56, 110):
    CIFAR_MODELS.register(f"resnet{_depth}")(
        partial(ResNet, block=BasicBlock, depths=[(_depth - 2) // 6] * 3, widths=(16, 32, 64), stem_width=16)
    )
for _depth in (8, 32):
    CIFAR_MODELS.register(f"resnet{_depth}x4")(
        partial(
            ResNet, block=BasicBlock, depths=[(_depth - 2) // 6] * 3, widths=(64, 128, 256), stem_width=32
        )
    )

# Four stages: ImageNet, and (18 to 50) CIFAR with a small stem and other parameter names.
_LARGE: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "ResNet18": (BasicBlock, (2, 2, 2, 2)),
    "ResNet34": (BasicBlock, (3, 4, 6, 3)),
    "ResNet50": (Bottleneck, (3, 4, 6, 3)),
    "ResNet101": (Bottleneck, (3, 4, 23, 3)),
}
for _name, (_block, _depths) in _LARGE.items():
    _build = partial(ResNet, block=_block, depths=_depths, widths=(64, 128, 256, 512), stem_width=64)
    IMAGENET_MODELS.register(_name)(partial(_build, large_images=True))
    if _name != "ResNet101":
        CIFAR_MODELS.register(_name)(partial(_build, projection="shortcut", classifier="linear"))
