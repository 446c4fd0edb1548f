"""Networks, one file a family. Importing the package registers all of them."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Any

import torch
from torch import nn

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models.base import CIFAR_MODELS, IMAGENET_MODELS, Builder, Network
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

VARIANTS: Registry[Registry[Builder]] = Registry("model variant")
VARIANTS.register("cifar")(CIFAR_MODELS)
VARIANTS.register("imagenet")(IMAGENET_MODELS)


def build_model(name: str, num_classes: int, *, variant: str = "cifar") -> Network:
    """A new network, its weights drawn from PyTorch's global generator.

    Args:
        name: a name of the variant's registry, mdistiller's names.
        num_classes: number of classes, at least 2.
        variant: "cifar" for small images, "imagenet" for 224 pixels; some names exist in both.

    Raises:
        ConfigError: unknown name (lists the near ones), unknown variant, fewer than two classes.
    """
    builder = VARIANTS[variant][name]
    if num_classes < 2:
        raise ConfigError(f"{num_classes} classes for model {name!r}: a classifier needs at least 2")
    network = builder(num_classes)
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
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        size = "x".join(str(side) for side in image_size)
        raise ConfigError(f"model {network.name!r} cannot take images of {size} pixels: {reason}") from error


__all__ = ["CIFAR_MODELS", "IMAGENET_MODELS", "Network", "build_model", "probe"]
