"""CIFAR's augmentation as batched tensor operations: zero padding, random crop, horizontal flip, normalisation.

Each outcome has a number, its *view*. Padding p allows (2p + 1) ** 2 crop offsets, each in one or two orientations:
``view = (y * (2p + 1) + x) * flips + flip``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PadCropFlip:
    """Pad each side with ``padding`` zeros, crop to the original size, and optionally flip."""

    padding: int
    flip: bool

    @property
    def views(self) -> int:
        """Number of views of an image."""
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def __call__(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Return one view of each indexed image, ``[B, H, W, 3]``.

        Args:
            images: ``[N, H, W, 3]``, a whole split. Only the batch is padded, to save memory.
            indices: ``[B]`` int64.
            views: ``[B]`` int64.
        """
        height, width = images.shape[1], images.shape[2]
        padded = functional.pad(images[indices], (0, 0, *[self.padding] * 4))
        offsets, flips = 2 * self.padding + 1, 2 if self.flip else 1
        offset, mirrored = views // flips, (views % flips)[:, None]
        rows = (offset // offsets)[:, None] + torch.arange(height, device=views.device)
        column = torch.arange(width, device=views.device)
        column = torch.where(mirrored == 1, width - 1 - column, column)
        columns = (offset % offsets)[:, None] + column
        sample = torch.arange(len(padded), device=views.device)
        return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``(images / 255 - mean) / std``, bit-identical to torchvision's ToTensor and Normalize.

    Images are uint8 ``[B, H, W, 3]``; the result is float32 ``[B, 3, H, W]`` in channels_last memory format.
    """
    return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)
