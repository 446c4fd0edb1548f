"""Base class of the networks, the model registries and the layers that several families share."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs


class Network(nn.Module, abc.ABC):
    """Image classifier that returns its intermediate feature maps.

    Args:
        norms: names of the batch norms for :meth:`norms_before_relu`, None for an entry without one.

    Attributes:
        num_classes: number of classes C.
        name: registered name, set by :func:`~mdistiller_norm.models.build_model`; defaults to the class name.
        pretrained: ``num_classes``, ``mean``, ``std`` and ``image_size`` of published weights, if known.
    """

    def __init__(self, num_classes: int, norms: Sequence[str | None] = ()) -> None:
        super().__init__()
        self.num_classes, self.name = num_classes, type(self).__name__
        self.pretrained: dict[str, Any] = {}
        self._norms = tuple(norms)

    @abc.abstractmethod
    def outputs(self, images: Tensor) -> Outputs:
        """Return the logits and all maps of ``images`` ``[B, 3, H, W]`` from one forward pass."""

    def norms_before_relu(self) -> tuple[nn.Module | None, ...]:
        """Return the batch norm before each entry of ``outputs(...).preacts`` (OFD computes its margins from them).

        For a residual stage it is the last norm of the last block, as in OFD. An entry is None if no norm covers all
        channels of the map, and for the stem, which OFD does not use.
        """
        return tuple(self.get_submodule(name) if name else None for name in self._norms)

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images).logits


Builder = Callable[[int], Network]

CIFAR_MODELS: Registry[Builder] = Registry("CIFAR model")
IMAGENET_MODELS: Registry[Builder] = Registry("ImageNet model")


class Stage(nn.Sequential):
    """Sequence of blocks with a ReLU after each; returns the last map after and before its ReLU."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        *inner, last = self
        for block in inner:
            x = F.relu(block(x), inplace=True)
        preact: Tensor = last(x)
        return F.relu(preact), preact


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Create a convolution without bias, padded so that stride 1 keeps the size."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Create :func:`conv` and the batch norm of its output."""
    return conv(in_channels, out_channels, kernel, stride, groups), nn.BatchNorm2d(out_channels)


def init_weights(network: nn.Module, classifier: nn.Linear | None = None) -> None:
    """Initialise convolutions from ``N(0, 2 / (k * k * out_channels))`` (He et al., 2015, fan-out), biases to zero.

    The weights of ``classifier``, if given, are initialised from ``N(0, 0.01 ** 2)``, its bias to zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if classifier is not None:
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
