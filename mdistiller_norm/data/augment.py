"""CIFAR's augmentation as batched tensor code: zero padding, random crop, horizontal flip, normalisation.

Every outcome has a name, its *view*: with padding p there are (2p+1)^2 crop offsets and, where flips are on, two
orientations of each, so ``view = (y * (2p+1) + x) * flips + flip``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PadCropFlip:
    """Pad by ``padding`` zeros on each side, crop back to the original size, mirror or not.

    Attributes:
        padding: pixels on each side.
        flip: whether views include mirrored ones.
    """

    padding: int
    flip: bool

    @property
    def offsets(self) -> int:
        """Crop positions along one axis."""
        return 2 * self.padding + 1

    @property
    def views(self) -> int:
        """Number of different outcomes for one image."""
        return self.offsets**2 * (2 if self.flip else 1)

    @property
    def identity(self) -> int:
        """The view that leaves an image as it is."""
        return self.name(self.padding, self.padding, 0)

    def name(self, y: int, x: int, flip: int) -> int:
        """The view with that crop offset and orientation."""
        return (y * self.offsets + x) * (2 if self.flip else 1) + flip

    def __call__(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """The named views of the named images.

        Only the batch is padded, not the whole split: that would be half as large again in memory.

        Args:
            images: ``[N, H, W, 3]``, a whole split.
            indices: ``[B]`` int64.
            views: ``[B]`` int64.

        Returns:
            ``[B, H, W, 3]``.
        """
        height, width = images.shape[1], images.shape[2]
        padded = functional.pad(images[indices], (0, 0, *[self.padding] * 4))
        flips = 2 if self.flip else 1
        offset, mirrored = views // flips, (views % flips)[:, None]
        rows = (offset // self.offsets)[:, None] + torch.arange(height, device=views.device)
        column = torch.arange(width, device=views.device)
        columns = (offset % self.offsets)[:, None] + torch.where(mirrored == 1, width - 1 - column, column)
        sample = torch.arange(len(padded), device=views.device)
        return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` to ``(x / 255 - mean) / std``, float32 ``[B, 3, H, W]`` in channels_last memory order.

    The operations and their order are those of torchvision's ToTensor and Normalize: equal to the bit.
    """
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)
