"""Adapter for a network whose weights expect other images than those of the data set."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Outputs

# image_size (height, width), mean and std; interpolation: bilinear or bicubic
Images = Mapping[str, Any]


def differences(theirs: Images, ours: Images) -> list[str]:
    """Return the keys of ``ours`` with clearly other values in ``theirs``; keys without a value there are equal."""
    pairs = {key: zip(theirs.get(key) or (), value, strict=False) for key, value in ours.items()}
    return [key for key, values in pairs.items() if any(abs(a - b) > 0.02 for a, b in values)]


class Preprocessed(Network):
    """Network that converts the images of a data set to those of its weights, on their device.

    The whole image, the student's crop, is resized with antialiasing and normalised, as the transforms of timm and
    torchvision do it without their central crop.

    Args:
        network: receives the converted images.
        theirs: images of the network's weights; keys without a value are as in ``ours``.
        ours: images of the data set.
    """

    def __init__(self, network: Network, theirs: Images, ours: Images) -> None:
        super().__init__(network.num_classes)
        self.network, self.name, self.pretrained = network, network.name, network.pretrained
        theirs = {**ours, **{key: value for key, value in theirs.items() if value}}

        def values(images: Images, key: str) -> Tensor:
            return torch.tensor(images[key], dtype=torch.float64).view(-1, 1, 1)

        std = values(theirs, "std")
        self.scale = nn.Buffer((values(ours, "std") / std).float())
        self.shift = nn.Buffer(((values(ours, "mean") - values(theirs, "mean")) / std).float())
        self.size = tuple(theirs["image_size"])
        # A buffer, for the hash that identifies a teacher cache.
        self.image_size = nn.Buffer(torch.tensor(self.size))
        self.mode = "bicubic" if theirs.get("interpolation") == "bicubic" else "bilinear"

    def outputs(self, images: Tensor) -> Outputs:
        images = images * self.scale + self.shift
        images = nn.functional.interpolate(images, self.size, mode=self.mode, antialias=True)
        return self.network.outputs(images)

    def norms_before_relu(self) -> tuple[nn.Module | None, ...]:
        return self.network.norms_before_relu()
