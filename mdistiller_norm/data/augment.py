"""Operations on batches of images on the device: CIFAR's random crop and flip, and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PadCropFlip:
    """Pad each side with ``padding`` zeros, crop to the original size, and optionally flip.

    Each outcome has a number, its *view*: ``(y * (2 * padding + 1) + x) * flips + flip`` for the crop offset (y, x),
    where ``flips`` is 2 with flipping and otherwise 1.
    """

    padding: int
    flip: bool

    @property
    def views(self) -> int:
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def __call__(self, images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
        """Return one view of each indexed image, ``[B, H, W, 3]``; ``indices`` and ``views`` are ``[B]`` int64."""
        height, width = images.shape[1:3]
        padded = torch.nn.functional.pad(images[indices], (0, 0, *[self.padding] * 4))
        offsets, flips = 2 * self.padding + 1, 2 if self.flip else 1
        offset, mirrored = views // flips, (views % flips)[:, None]
        rows = (offset // offsets)[:, None] + torch.arange(height, device=views.device)
        column = torch.arange(width, device=views.device)
        column = torch.where(mirrored == 1, width - 1 - column, column)
        columns = (offset % offsets)[:, None] + column
        sample = torch.arange(len(padded), device=views.device)
        return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]


class Normalise:
    """Compute ``(images / 255 - mean) / std``, bit-identical to torchvision's ToTensor and Normalize.

    Images are uint8 ``[B, H, W, 3]``; the result is float32 ``[B, 3, H, W]`` in channels_last memory format.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)
