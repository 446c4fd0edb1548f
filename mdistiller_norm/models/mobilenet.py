"""MobileNetV1 for ImageNet and MobileNetV2 of half width for CIFAR.

Sources: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications" (2017),
parameter names as in mdistiller; Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018) in
RepDistiller's variant (ReLU instead of ReLU6, one stride fewer) with its parameter names.
"""

from torch import Tensor, nn

from mdistiller_norm.models.base import (
    CIFAR_MODELS,
    IMAGENET_MODELS,
    Network,
    conv_bn,
    init_weights,
)
from mdistiller_norm.types import Outputs

# V1: channels and stride of blocks 1 to 13, and the blocks whose outputs are features (the last of each size).
V1_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip
V1_FEATURES = (3, 5, 11, 13)
# V2: expansion, channels, depth and stride of each group, and the groups whose outputs are features.
V2_GROUPS = (
    (1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1),
)  # fmt: skip
V2_FEATURES = (1, 2, 4, 6)
V2_STEM, V2_HEAD = 16, 1280


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [*conv_bn(in_channels, out_channels, kernel, stride, groups), nn.ReLU(inplace=True)]


class MobileNetV1(Network):
    """3x3 convolution with stride 2, then thirteen depthwise separable blocks.

    ``features`` are the maps after the ReLU at 1/4, 1/8, 1/16 and 1/32 of the image size, without a stem (as in
    mdistiller); ``preacts`` are the same maps before it. Weights use PyTorch's default initialisation.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, [f"model.{block}.4" for block in V1_FEATURES])
        channels = 32
        blocks = [nn.Sequential(*conv_bn(3, channels, 3, stride=2))]
        for width, stride in V1_BLOCKS:
            depthwise = _conv_bn_relu(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(*depthwise, *conv_bn(channels, width, 1)))
            channels = width
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        x, features, preacts = images, [], []
        for index, block in enumerate(self.model):
            preact = block(x)
            x = nn.functional.relu(preact, inplace=index not in V1_FEATURES)
            if index in V1_FEATURES:
                features.append(x)
                preacts.append(preact)
        pooled = x.mean((2, 3))
        return Outputs(self.fc(pooled), tuple(features), tuple(preacts), pooled)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter (depthwise 3x3), project (1x1, linear); residual if the shape is unchanged."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        expand = _conv_bn_relu(in_channels, width, 1)
        depthwise = _conv_bn_relu(width, width, 3, stride, groups=width)
        self.conv = nn.Sequential(*expand, *depthwise, *conv_bn(width, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.residual:
            out += x
        return out


class MobileNetV2(Network):
    """Stem with stride 2, seven groups of inverted residuals, 1x1 head.

    ``features`` are the stem after its ReLU and the outputs of groups 1, 2, 4 and 6, which are linear and can be
    negative (as in mdistiller). ``preacts`` are the same maps.
    """

    def __init__(self, num_classes: int) -> None:
        last = {group: depth - 1 for group, (_, _, depth, _) in enumerate(V2_GROUPS)}
        super().__init__(
            num_classes, [None, *(f"blocks.{n}.{last[n]}.conv.7" for n in V2_FEATURES)]
        )
        self.conv1 = nn.Sequential(*_conv_bn_relu(3, V2_STEM, 3, stride=2))
        self.blocks = nn.ModuleList()
        channels = V2_STEM
        for expansion, width, depth, stride in V2_GROUPS:
            first = InvertedResidual(channels, width, stride, expansion)
            rest = (InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            channels = width
        self.conv2 = nn.Sequential(*_conv_bn_relu(channels, V2_HEAD, 1))
        linear = nn.Linear(V2_HEAD, num_classes)
        self.classifier = nn.Sequential(linear)
        init_weights(self, linear)

    def outputs(self, images: Tensor) -> Outputs:
        x = self.conv1(images)
        features = [x]
        for index, group in enumerate(self.blocks):
            x = group(x)
            if index in V2_FEATURES:
                features.append(x)
        pooled = self.conv2(x).mean((2, 3))
        return Outputs(self.classifier(pooled), tuple(features), tuple(features), pooled)


IMAGENET_MODELS["MobileNetV1"] = MobileNetV1
CIFAR_MODELS["MobileNetV2"] = MobileNetV2
