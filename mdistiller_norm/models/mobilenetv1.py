"""MobileNetV1 for ImageNet.

Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications" (2017);
parameter names as in mdistiller.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import IMAGENET_MODELS, Network, conv, global_pool, last_norm
from mdistiller_norm.types import Outputs

# Channels and stride of the depthwise separable blocks 1 to 13.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
SHOWN = (3, 5, 11, 13)  # the blocks whose outputs are features: the last at each size


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3, BN, ReLU, 1x1, BN; the last ReLU is left to the network."""
    return nn.Sequential(
        conv(in_channels, in_channels, 3, stride, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        conv(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
    )


class MobileNetV1(Network):
    """A 3x3 convolution with stride 2, then thirteen depthwise separable blocks.

    ``features`` are four maps after the ReLU, at 1/4, 1/8, 1/16 and 1/32 of the image's size; there is no stem among
    them, as in mdistiller. ``preacts`` are the same before it. Weights start as PyTorch's defaults.

    Args:
        num_classes: number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        channels = 32
        blocks = [nn.Sequential(conv(3, channels, 3, stride=2), nn.BatchNorm2d(channels))]
        for width, stride in BLOCKS:
            blocks.append(_separable(channels, width, stride))
            channels = width
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`."""
        x, features, preacts = images, [], []
        for index, block in enumerate(self.model):
            preact = block(x)
            shown = index in SHOWN
            x = F.relu(preact, inplace=not shown)
            if shown:
                features.append(x)
                preacts.append(preact)
        pooled = global_pool(x)
        return Outputs(self.fc(pooled), tuple(features), tuple(preacts), pooled)

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`; here every map is a batch norm's output."""
        return tuple(last_norm(self.model[index]) for index in SHOWN)


IMAGENET_MODELS.register("MobileNetV1")(MobileNetV1)
