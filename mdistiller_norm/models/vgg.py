"""VGG with batch norm, for CIFAR.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015); the variant
with one linear layer and its parameter names as in RepDistiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.models.base import CIFAR_MODELS, Network, global_pool, init_classifier, init_convs, last_norm
from mdistiller_norm.types import Outputs

WIDTHS = (64, 128, 256, 512, 512)


def _block(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """``depth`` times 3x3 convolution, BN, ReLU, without the last ReLU."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels)]
        layers += [nn.ReLU(inplace=True)]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])


def _fourth_pool(x: Tensor, image_height: int) -> Tensor:
    """The last block sees 4x4 maps at 32 pixels and at 64: only the latter need a fourth pooling."""
    return F.max_pool2d(x, 2) if image_height == 64 else x


torch.fx.wrap("_fourth_pool")  # a branch on a size: symbolic tracing keeps the call whole


class VGG(Network):
    """Five blocks, max-pooling after the first three; after the fourth as well for images 64 pixels high.

    ``features`` are the ends of the blocks after the ReLU, before pooling; ``preacts`` the same before the ReLU, except
    that the first block appears after it in both, as in mdistiller.

    Args:
        num_classes: number of classes.
        depths: number of convolutions of each block.
    """

    def __init__(self, num_classes: int, *, depths: Sequence[int]) -> None:
        super().__init__(num_classes)
        channels = (3, *WIDTHS)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _block(channels[index], channels[index + 1], depths[index]) for index in range(5)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_convs(self)
        init_classifier(self.classifier)

    def outputs(self, images: Tensor) -> Outputs:
        """See :class:`Network`."""
        feature0 = F.relu(self.block0(images), inplace=True)
        preact1 = self.block1(F.max_pool2d(feature0, 2))
        feature1 = F.relu(preact1)
        preact2 = self.block2(F.max_pool2d(feature1, 2))
        feature2 = F.relu(preact2)
        preact3 = self.block3(F.max_pool2d(feature2, 2))
        feature3 = F.relu(preact3)
        preact4 = self.block4(_fourth_pool(feature3, images.shape[2]))
        feature4 = F.relu(preact4)
        pooled = global_pool(feature4)
        return Outputs(
            logits=self.classifier(pooled),
            features=(feature0, feature1, feature2, feature3, feature4),
            preacts=(feature0, preact1, preact2, preact3, preact4),
            pooled=pooled,
        )

    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """See :class:`Network`."""
        blocks = (self.block1, self.block2, self.block3, self.block4)
        return (None, *(last_norm(block) for block in blocks))


_DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
for _name, _depths in _DEPTHS.items():
    CIFAR_MODELS.register(_name)(partial(VGG, depths=_depths))
