"""MobileNetV2 of half width, for CIFAR.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018); RepDistiller's variant with
ReLU in place of ReLU6, one stride fewer, and its parameter names.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdistiller_norm.models.base import CIFAR_MODELS, Network, conv, global_pool, init_classifier, init_convs, last_norm
from mdistiller_norm.types import Outputs

STEM, HEAD = 16, 1280
# Of each group of blocks: expansion, channels, number of blocks, stride of the first.
GROUPS = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
SHOWN = (1, 2, 4, 6)  # the groups whose outputs are features


def _conv_norm_relu(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = conv(in_channels, out_channels, kernel, stride, groups)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter by depthwise 3x3, project by 1x1 without activation; residual where the shape is kept."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_conv_norm_relu(in_channels, width, 1),
            *_conv_norm_relu(width, width, 3, stride, groups=width),
            conv(width, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, which has no activation."""
        out: Tensor = self.conv(x)
        if self.residual:
            out += x
        return out


class MobileNetV2(Network):
    """A stem with stride 2, seven groups of inverted residuals, a 1x1 head.

    ``features`` are the stem after its ReLU and the outputs of groups 1, 2, 4 and 6, which are linear (they can be
    negative), as in mdistiller. mdistiller has no pre-activations here; ``preacts`` are the same maps as ``features``,
    since none of the linear ones has an activation to be before.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.conv1 = nn.Sequential(*_conv_norm_relu(3, STEM, 3, stride=2))
        self.blocks = nn.ModuleList()
        channels = STEM
        for expansion, width, depth, stride in GROUPS:
            blocks = [InvertedResidual(channels, width, stride, expansion)]
            blocks += [InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1)]
            self.blocks.append(nn.Sequential(*blocks))
            channels = width
        self.conv2 = nn.Sequential(*_conv_norm_relu(channels, HEAD, 1))
        linear = nn.Linear(HEAD, num_classes)
        self.classifier = nn.Sequential(linear)
        init_convs(self)
        init_classifier(linear)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`."""
        x = self.conv1(images)
        features = [x]
        for index, group in enumerate(self.blocks):
            x = group(x)
            if index in SHOWN:
                features.append(x)
        pooled = global_pool(self.conv2(x))
        return Outputs(self.classifier(pooled), tuple(features), tuple(features), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`."""
        return (None, *(last_norm(self.blocks[index]) for index in SHOWN))


CIFAR_MODELS.register("MobileNetV2")(MobileNetV2)
