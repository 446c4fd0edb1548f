"""VGG with batch norm and one linear layer, for CIFAR.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015); variant and
parameter names as in RepDistiller.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Network, init_weights
from mdistiller_norm.types import Outputs

WIDTHS = (64, 128, 256, 512, 512)


def _block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])


def _fourth_pool(x: Tensor, image_height: int) -> Tensor:
    """Pool maps of 64-pixel images, so that the last block has 4x4 maps at 32 and at 64 pixels."""
    return F.max_pool2d(x, 2) if image_height == 64 else x


torch.fx.wrap("_fourth_pool")  # symbolic tracing cannot follow a branch on a size


class VGG(Network):
    """Five blocks with max-pooling after the first three, and after the fourth for images of 64 pixels.

    ``features`` are the ends of the blocks after the ReLU and before pooling; ``preacts`` are the same maps before the
    ReLU, except for the first block, which is after it in both (as in mdistiller). ``depths`` are the numbers of
    convolutions of the blocks.
    """

    def __init__(self, num_classes: int, *, depths: Sequence[int]) -> None:
        norms = [f"block{block}.{3 * depth - 2}" for block, depth in enumerate(depths)]
        super().__init__(num_classes, [None, *norms[1:]])
        channels = (3, *WIDTHS)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _block(channels[index], channels[index + 1], depths[index]) for index in range(5)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_weights(self, self.classifier)

    def outputs(self, images: Tensor) -> Outputs:
        x = F.relu(self.block0(images), inplace=True)
        features, preacts = [x], [x]
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = _fourth_pool(x, images.shape[2]) if block is self.block4 else F.max_pool2d(x, 2)
            preact = block(x)
            x = F.relu(preact)
            features.append(x)
            preacts.append(preact)
        pooled = x.mean((2, 3))
        return Outputs(self.classifier(pooled), tuple(features), tuple(preacts), pooled)


_DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1), "vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}  # fmt: skip
for _name, _depths in _DEPTHS.items():
    CIFAR_MODELS[_name] = partial(VGG, depths=_depths)
