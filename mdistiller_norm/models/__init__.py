"""Networks, one file per family. Importing the package registers all of them."""

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.models.base import CIFAR_MODELS, IMAGENET_MODELS, Builder, Network
from mdistiller_norm.models.external import PREFIXES, build_external, has_weights
from mdistiller_norm.models.wrapped import Wrapped
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Outputs

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

VARIANTS: Registry[Registry[Builder]] = Registry("model variant")
VARIANTS.update(cifar=CIFAR_MODELS, imagenet=IMAGENET_MODELS)


def register(
    name: str, variants: Sequence[str] = ("cifar", "imagenet")
) -> Callable[[Builder], Builder]:
    """Register a function from the number of classes to a network (decorator).

    Args:
        name: value of ``DISTILLER.STUDENT`` and ``DISTILLER.TEACHER``.
        variants: the registries to add it to; the image size of a data set selects one of them.

    Raises:
        ValueError: the name is already registered.
        TypeError: the function cannot be called with the number of classes.
    """

    def add(builder: Builder) -> Builder:
        try:
            inspect.signature(builder).bind(2)
        except TypeError as error:
            raise TypeError(f"{name!r} requires a function of num_classes ({error})") from error
        for variant in variants:
            VARIANTS[variant].register(name)(builder)
        return builder

    return add


def build_model(
    name: str,
    num_classes: int,
    *,
    variant: str = "cifar",
    image_size: tuple[int, ...] | None = None,
    pretrained: bool = False,
) -> Network:
    """Build a network, initialised from PyTorch's global generator.

    Args:
        name: a registered name (the built-in ones are mdistiller's), or ``timm:NAME``, ``torchvision:NAME`` or
            ``hf-hub:USER/REPO``.
        num_classes: number of classes, at least 2.
        variant: ``"cifar"`` for small images, ``"imagenet"`` for 224 pixels; some names exist in both.
            Networks of other libraries ignore it.
        image_size: height and width, for networks of other libraries that are built for one size.
        pretrained: load the published weights of a network of another library.

    Raises:
        ConfigError: the name or variant is unknown, or the network cannot be built.
    """
    if num_classes < 2:
        raise ConfigError(f"model {name!r} requires at least 2 classes, got {num_classes}")
    if name.startswith(PREFIXES):
        network = build_external(name, num_classes, image_size, pretrained)
        network.name = name
        return network
    if pretrained:
        raise ConfigError(
            f"pretrained weights need a model named {'|'.join(PREFIXES)}, got {name}"
        )
    models = VARIANTS[variant]
    others = [other for other in VARIANTS if name in VARIANTS[other]]
    if name not in models and others:
        raise ConfigError(
            f"model {name!r} requires DATASET.VARIANT {others[0]}; {variant} has {', '.join(models)}"
        )
    try:
        network = models[name](num_classes)
    except (OSError, TypeError) as error:  # a missing file, or a class without num_classes
        raise ConfigError(f"model {name!r} cannot be built: {first_line(error)}") from error
    if not isinstance(network, Network):
        raise ConfigError(f"model {name!r} must be a Network or Wrapped, got {type(network)}")
    network.name = name
    return network


def probe(network: Network, image_size: Sequence[int] = (32, 32)) -> Outputs:
    """Return the outputs of a network for a batch of 2 as meta tensors, without computing them.

    The forward pass runs on a copy in eval mode; the network and the random generators are not changed.

    Raises:
        ConfigError: the network does not support this image size (height, width).
    """
    shadow = copy.deepcopy(network).to("meta").eval()
    dtype = next(shadow.parameters()).dtype
    try:
        with torch.no_grad():
            return shadow.outputs(torch.empty(2, 3, *image_size, dtype=dtype, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"{network.name!r} cannot take images of size {list(image_size)}: {first_line(error)}"
        ) from error


def count_macs(network: Network, image_size: Sequence[int]) -> int:
    """Return the multiply-accumulate operations of a forward pass for one image, counted on the meta device."""
    with FlopCounterMode(display=False) as counter:
        probe(network, image_size)  # two images
    return int(counter.get_total_flops()) // 4


__all__ = [
    "CIFAR_MODELS", "IMAGENET_MODELS", "PREFIXES", "Network", "Wrapped", "build_model", "count_macs", "has_weights",
    "probe", "register",
]  # fmt: skip
