"""From the bytes of an image file to the uint8 pixels that a network sees.

simplejpeg (libjpeg-turbo) decodes JPEGs where it is installed, Pillow everything else. Both give the same pixels (those
of CMYK files within one level).
Cropping and resizing are torchvision's v2 functions on uint8 tensors, which round otherwise than Pillow's: at most 2 of
255 levels from the usual pipeline.
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

try:
    import simplejpeg
except ImportError:  # the extra "imagenet" brings it
    simplejpeg = None

ATTEMPTS = 10  # to find a crop of the drawn area and shape inside the image, as torchvision's RandomResizedCrop


class View(NamedTuple):
    """A training view of an image: this box of it, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def decode(content: bytes) -> Tensor:
    """RGB pixels ``[3, H, W]`` uint8, pixels contiguous (channels_last); grey and CMYK images are converted.

    Raises:
        OSError, ValueError, SyntaxError: not an image, or a damaged one.
    """
    pixels: Any
    if simplejpeg is not None and content[:2] == b"\xff\xd8":
        try:
            pixels = simplejpeg.decode_jpeg(content, "RGB")
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except ValueError:
            pass  # for Pillow to judge
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.array(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def draw_view(random: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> View:
    """A random box and orientation, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Args:
        random: what it is drawn from.
        height: of the image.
        width: of the image.
        scale: least and largest share of the image's area; shapes are between 3:4 and 4:3.
    """
    flip = bool(random.random() < 0.5)
    areas = height * width * random.uniform(*scale, ATTEMPTS)
    ratios = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), ATTEMPTS))
    places = random.random((ATTEMPTS, 2))
    for area, ratio, (down, right) in zip(areas.tolist(), ratios.tolist(), places.tolist(), strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return View(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w, flip)
    # The middle, in the nearest shape that is allowed.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return View((height - h) // 2, (width - w) // 2, h, w, flip)


def train_image(image: Tensor, view: View, size: int) -> Tensor:
    """The view of an image ``[3, H, W]`` in the size that the network sees, ``[3, size, size]``."""
    crop = image[:, view.top : view.top + view.height, view.left : view.left + view.width]
    resized: Tensor = F.resize(crop, [size, size], antialias=True)
    return resized.flip(2) if view.flip else resized


def eval_image(image: Tensor, resize: int, size: int) -> Tensor:
    """The middle ``[3, size, size]`` of an image whose shorter side was resized to ``resize``."""
    resized: Tensor = F.center_crop(F.resize(image, [resize], antialias=True), [size, size])
    return resized
