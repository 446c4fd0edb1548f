"""Base class of the networks, the model registries and the layers that several families share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs


class Network(nn.Module, abc.ABC):
    """Image classifier that returns its intermediate feature maps.

    Attributes:
        num_classes: number of classes C.
        name: registered name, set by :func:`~mdistiller_norm.models.build_model`; defaults to the class name.
        pretrained: ``num_classes``, ``mean``, ``std`` and ``image_size`` of published weights, if known.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.name = type(self).__name__
        self.pretrained: dict[str, Any] = {}

    @abc.abstractmethod
    def outputs(self, images: Tensor) -> Outputs:
        """Return the logits and all maps of ``images`` ``[B, 3, H, W]`` from one forward pass."""

    @abc.abstractmethod
    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """Return the batch norm before each entry of ``outputs(...).preacts`` (OFD computes its margins from them).

        For a residual stage it is the last norm of the last block, as in OFD. An entry is None if no norm covers all
        channels of the map, and for the stem, which OFD does not use.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` of ``images`` ``[B, 3, H, W]``."""
        return self.outputs(images).logits


Builder = Callable[[int], Network]

CIFAR_MODELS: Registry[Builder] = Registry("CIFAR model")
IMAGENET_MODELS: Registry[Builder] = Registry("ImageNet model")


class Block(nn.Module):
    """Block that returns the pre-activation of its output; the :class:`Stage` applies the final ReLU."""

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """Last norm of the block, None if it does not cover all output channels."""
        return None


class Stage(nn.Sequential):
    """Sequence of blocks with a ReLU after each; returns the last map after and before its ReLU."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *inner, last = self
        for block in inner:
            x = F.relu(block(x), inplace=True)
        preact: Tensor = last(x)
        return F.relu(preact), preact

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """Last norm of the last block."""
        last = self[-1]
        assert isinstance(last, Block)
        return last.norm


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Create a convolution without bias, padded so that stride 1 keeps the size."""
    padding = kernel // 2
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=padding, groups=groups, bias=False)


def global_pool(x: Tensor) -> Tensor:
    """Average ``[B, D, H, W]`` over the pixels to ``[B, D]``."""
    return x.mean((2, 3))


def last_norm(module: nn.Module) -> nn.BatchNorm2d:
    """Return the last batch norm of ``module`` in registration order."""
    return [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)][-1]


def init_convs(network: nn.Module) -> None:
    """Initialise convolutions from ``N(0, 2 / (k * k * out_channels))`` (He et al., 2015, fan-out), biases to zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(linear: nn.Linear) -> None:
    """Initialise the weights from ``N(0, 0.01 ** 2)`` and the bias to zero."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
