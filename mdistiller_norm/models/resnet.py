"""Residual networks for CIFAR, with three stages (resnet8 ... resnet32x4) or four (ResNet18 ...), and for ImageNet.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016). Bottlenecks have the stride in the 3x3
convolution, as in torchvision. Parameter names match the public checkpoints: RepDistiller's and mdistiller's for CIFAR,
torchvision's for ImageNet.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models import base
from mdistiller_norm.models.base import CIFAR_MODELS, IMAGENET_MODELS, Network, conv_bn
from mdistiller_norm.types import Outputs


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, plus the identity; without the last ReLU.

    A bottleneck has four times as many output channels as inner ones (``width``). ``projection`` is the parameter name
    of the identity's projection, which exists if the shape changes.
    """

    def __init__(
        self, in_channels: int, width: int, stride: int, bottleneck: bool, projection: str
    ) -> None:
        super().__init__()
        out_channels = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1, self.bn1 = conv_bn(in_channels, width, 1)
            self.conv2, self.bn2 = conv_bn(width, width, 3, stride)
            self.conv3, self.bn3 = conv_bn(width, out_channels, 1)
        else:
            self.conv1, self.bn1 = conv_bn(in_channels, width, 3, stride)
            self.conv2, self.bn2 = conv_bn(width, width, 3)
        self.bottleneck = bottleneck
        self.projection = projection if stride != 1 or in_channels != out_channels else ""
        if self.projection:
            self.add_module(
                projection, nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(F.relu(out, inplace=True)))
        out += self.get_submodule(self.projection)(x) if self.projection else x
        return out


class ResNet(Network):
    """Stem and stages; every stage but the first halves the size.

    ``features`` are the stem and the end of each stage after the ReLU; ``preacts`` are the same maps before it, except
    for the stem of a CIFAR network, which is after its ReLU in both (as in mdistiller).

    Args:
        widths: inner channels of the blocks of each stage.
        large_images: use ImageNet's stem (7x7, stride 2, max-pooling) instead of CIFAR's (3x3, stride 1).
        projection: parameter name of the projections.
        classifier: parameter name of the classifier.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depths: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        bottleneck: bool = False,
        large_images: bool = False,
        projection: str = "downsample",
        classifier: str = "fc",
    ) -> None:
        stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        ends = [f"{stage}.{depth - 1}" for stage, depth in zip(stages, depths, strict=True)]
        super().__init__(
            num_classes, [None, *(f"{end}.bn{3 if bottleneck else 2}" for end in ends)]
        )
        self.stages, self.classifier, self.large_images = stages, classifier, large_images
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.conv1, self.bn1 = conv_bn(3, stem_width, kernel, stride)
        channels = stem_width
        for stage, depth, width in zip(stages, depths, widths, strict=True):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and stage != "layer1" else 1
                blocks.append(ResidualBlock(channels, width, stride, bottleneck, projection))
                channels = 4 * width if bottleneck else width
            self.add_module(stage, base.Stage(*blocks))
        self.add_module(classifier, nn.Linear(channels, num_classes))
        base.init_weights(self)

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
        pooled = x.mean((2, 3))
        logits = self.get_submodule(self.classifier)(pooled)
        return Outputs(logits, tuple(features), tuple(preacts), pooled)


# CIFAR with three stages: the depth in the name is 6 * blocks + 2; "x4" networks are four times as wide.
for _depth in (8, 14, 20, 32, 44, 56, 110):
    _build = partial(ResNet, depths=[(_depth - 2) // 6] * 3)
    CIFAR_MODELS[f"resnet{_depth}"] = partial(_build, widths=(16, 32, 64), stem_width=16)
    if _depth in (8, 32):
        CIFAR_MODELS[f"resnet{_depth}x4"] = partial(_build, widths=(64, 128, 256), stem_width=32)

# Four stages: ImageNet, and (18 to 50) CIFAR with a small stem and other parameter names.
_FOUR_STAGES = partial(ResNet, widths=(64, 128, 256, 512), stem_width=64)
_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
for _depth, _depths in _DEPTHS.items():
    _build = partial(_FOUR_STAGES, depths=_depths, bottleneck=_depth >= 50)
    IMAGENET_MODELS[f"ResNet{_depth}"] = partial(_build, large_images=True)
    if _depth < 101:
        CIFAR_MODELS[f"ResNet{_depth}"] = partial(
            _build, projection="shortcut", classifier="linear"
        )
