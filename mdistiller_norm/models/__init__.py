"""Networks, one file a family. Importing the package registers all of them."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.models.base import CIFAR_MODELS, IMAGENET_MODELS, Builder, Network
from mdistiller_norm.models.wrapped import Wrapped
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

VARIANTS: Registry[Registry[Builder]] = Registry("model variant")
VARIANTS.register("cifar")(CIFAR_MODELS)
VARIANTS.register("imagenet")(IMAGENET_MODELS)


def register(name: str, variants: Sequence[str] = ("cifar", "imagenet")) -> Callable[[Builder], Builder]:
    """Decorator that files a function from the number of classes to a network under a model name.

    Args:
        name: for ``DISTILLER.STUDENT`` and ``DISTILLER.TEACHER``.
        variants: the families in which it is found; which one a data set asks for depends on the size of its images.

    Raises:
        ValueError: the name is taken.
    """

    def add(builder: Builder) -> Builder:
        for variant in variants:
            VARIANTS[variant].register(name)(builder)
        return builder

    return add


def build_model(name: str, num_classes: int, *, variant: str = "cifar") -> Network:
    """A new network, its weights drawn from PyTorch's global generator.

    Args:
        name: a name of the variant's registry, mdistiller's names.
        num_classes: number of classes, at least 2.
        variant: "cifar" for small images, "imagenet" for 224 pixels; some names exist in both.

    Raises:
        ConfigError: unknown name (lists the near ones), unknown variant, fewer than two classes, not a network.
    """
    elsewhere = [other for other, models in VARIANTS.items() if name in models]
    if elsewhere and variant in VARIANTS and variant not in elsewhere:
        raise ConfigError(
            f"model {name!r} is of the variant {elsewhere[0]}, and this data set asks for networks of the variant "
            f"{variant}: {', '.join(sorted(VARIANTS[variant]))} (image files: DATASET.VARIANT chooses)"
        )
    builder = VARIANTS[variant][name]
    if num_classes < 2:
        raise ConfigError(f"{num_classes} classes for model {name!r}: a classifier needs at least 2")
    try:
        network = builder(num_classes)
    except OSError as error:  # published weights that it starts from
        raise ConfigError(f"model {name!r} cannot be built: {first_line(error)}") from error
    if not isinstance(network, Network):
        raise ConfigError(f"model {name!r} is built as a {type(network).__name__}: make it a Wrapped")
    network.name = name
    return network


def probe(network: Network, image_size: tuple[int, int] = (32, 32)) -> Outputs:
    """The shapes of a network's outputs, found without computing.

    Runs a copy on the meta device in eval mode: the network's state and mode and the random generators stay untouched.

    Args:
        network: on any device.
        image_size: height and width in pixels.

    Returns:
        Outputs of meta tensors for a batch of 2.

    Raises:
        ConfigError: the network cannot take images of this size.
    """
    # deepcopy takes what its memo holds for a tensor: the copy has the structure, and no memory for the values.
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    shadow = copy.deepcopy(network, memo).eval()
    dtype = next(network.parameters()).dtype
    try:
        with torch.no_grad():
            return shadow.outputs(torch.empty(2, 3, *image_size, dtype=dtype, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        size = "x".join(str(side) for side in image_size)
        raise ConfigError(f"model {network.name!r} cannot take images of {size} pixels: {reason}") from error


__all__ = ["CIFAR_MODELS", "IMAGENET_MODELS", "Network", "Wrapped", "build_model", "probe", "register"]
