"""From the bytes of an image file to uint8 pixels of the size that a network takes.

simplejpeg (libjpeg-turbo) decodes JPEGs if it is installed, Pillow all other files. torchvision crops and resizes the
uint8 tensors; the result differs from that on Pillow images by at most 2 of 255 levels.
"""

import contextlib
import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # installed by the extra "imagenet"
    simplejpeg = None

# Formats that Pillow decodes by itself: it would call Ghostscript for EPS, whatever the name of the file is.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
Crop = tuple[int, int, int, int, bool]  # top, left, height, width, mirrored
ATTEMPTS = 10  # to draw a crop inside the image, as in torchvision
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # texts of up to 64 MiB


def decode(content: bytes) -> Tensor:
    """Decode an image file to RGB, ``[3, H, W]`` uint8 in channels_last memory order.

    Grey and CMYK images are converted. Of 16-bit pixels the upper 8 bits are kept. EXIF orientation is ignored.

    Raises:
        UNREADABLE: not an image, a damaged one, or one of 32-bit pixels.
    """
    if simplejpeg is not None and content[:2] == b"\xff\xd8":
        with contextlib.suppress(ValueError):  # Pillow decides
            return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB")).permute(2, 0, 1)
    try:
        with warnings.catch_warnings(action="ignore"):  # they do not name the file
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.mode in ("I", "F"):
                raise ValueError("pixels of 32 bits have no known range")
            if image.mode.startswith("I;16"):  # Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:  # its message contains an address
        raise ValueError(f"not an image of the formats {', '.join(FORMATS)}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def draw_crop(
    random: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> Crop:
    """Draw a crop, distributed as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    ``scale`` is the smallest and largest fraction of the image's area; aspect ratios are between 3:4 and 4:3.
    """
    flip = bool(random.random() < 0.5)
    areas = height * width * random.uniform(*scale, ATTEMPTS)
    ratios = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), ATTEMPTS))
    offsets = random.random((ATTEMPTS, 2))
    for area, ratio, (down, right) in zip(areas, ratios, offsets, strict=True):
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w, flip
    # No attempt fits: take the centre, in the nearest allowed aspect ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w, flip


def train_image(image: Tensor, crop: Crop, size: int) -> Tensor:
    """Crop an image ``[3, H, W]``, resize it to ``[3, size, size]`` and flip it."""
    from torchvision.transforms.v2 import functional  # takes a second to import

    top, left, height, width, flip = crop
    box = image[:, top : top + height, left : left + width]
    box = box.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # resized a third faster
    resized: Tensor = functional.resize(box, [size, size], antialias=True)
    return resized.flip(2) if flip else resized


def eval_image(image: Tensor, resize: int, size: int) -> Tensor:
    """Resize the shorter side of an image to ``resize`` and return the centre ``[3, size, size]``."""
    from torchvision.transforms.v2 import functional

    longest = 16 * min(image.shape[1:])  # resizing a longer image could take gigabytes
    image = functional.center_crop(image, [min(side, longest) for side in image.shape[1:]])
    resized = functional.resize(image, [resize], antialias=True)
    centre: Tensor = functional.center_crop(resized, [size, size])
    return centre
