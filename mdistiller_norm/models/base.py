"""What every network is, the two registries, and the pieces that more than one family uses."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs


class Network(nn.Module, abc.ABC):
    """An image classifier that shows its intermediate maps.

    Attributes:
        num_classes: number of classes C.
        name: what it was built as; the name of its class until :func:`~mdistiller_norm.models.build_model` sets it.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.name = type(self).__name__

    @abc.abstractmethod
    def outputs(self, images: Tensor) -> Outputs:
        """Logits and all maps of ``images`` ``[B, 3, H, W]``, in one pass."""

    @abc.abstractmethod
    def norms_before_relu(self) -> tuple[nn.BatchNorm2d | None, ...]:
        """For each entry of ``outputs(...).preacts`` the batch norm that sets its distribution (OFD's margins).

        It is the norm whose output the map is; at the end of a residual stage, the last norm of the last block, as in
        OFD. None where there is no such norm, and always for the stem, which OFD leaves out.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of ``images`` ``[B, 3, H, W]``."""
        return self.outputs(images).logits


Builder = Callable[[int], Network]

CIFAR_MODELS: Registry[Builder] = Registry("CIFAR model")
IMAGENET_MODELS: Registry[Builder] = Registry("ImageNet model")


class Block(nn.Module, abc.ABC):
    """A block that ends in a ReLU and leaves it to its :class:`Stage`: it returns the pre-activation."""

    @property
    @abc.abstractmethod
    def norm(self) -> nn.BatchNorm2d | None:
        """The block's last norm, if it has a channel for each of the block's output."""


class Stage(nn.Sequential):
    """Blocks with a ReLU after each."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(*blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's last map after its ReLU, and before it."""
        *inner, last = self
        for block in inner:
            x = F.relu(block(x), inplace=True)
        preact: Tensor = last(x)
        return F.relu(preact), preact

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        """The last norm of the last block."""
        last = self[-1]
        assert isinstance(last, Block)
        return last.norm


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def global_pool(x: Tensor) -> Tensor:
    """Mean over the pixels: ``[B, D, H, W]`` to ``[B, D]``, at any size."""
    return x.mean((2, 3))


def last_norm(module: nn.Module) -> nn.BatchNorm2d:
    """The batch norm that comes last in ``module``, in the order of registration."""
    return [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)][-1]


def init_convs(network: nn.Module) -> None:
    """Weights from ``N(0, 2 / (k * k * out_channels))`` (He et al., 2015, fan-out), biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_classifier(linear: nn.Linear) -> None:
    """Weights from ``N(0, 0.01 ** 2)``, bias zero."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
