"""From the bytes of an image file to the uint8 pixels that a network sees.

simplejpeg (libjpeg-turbo) decodes JPEGs where it is installed, Pillow everything else. Both give the same pixels (those
of CMYK files within one level).
Cropping and resizing are torchvision's v2 functions on uint8 tensors, which round otherwise than Pillow's: at most 2 of
255 levels from the usual pipeline.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # the extra "imagenet" brings it
    simplejpeg = None

ATTEMPTS = 10  # to find a crop of the drawn area and shape inside the image, as torchvision's RandomResizedCrop
UNREADABLE = (OSError, ValueError, SyntaxError)  # what decoding a damaged file raises

_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a frame header
_SEQUENTIAL = (0xC0, 0xC1)  # those of files whose rows are stored from the top down
_SCAN = 0xDA
_ROWS_BELOW = 16  # that are decoded too: smoothing the colours of a row looks at the next one, at most 4 rows away


@cache
def transforms() -> Any:
    """torchvision's functions on tensors: a second to import, which data sets without files need not spend."""
    from torchvision.transforms.v2 import functional

    return functional


class View(NamedTuple):
    """A training view of an image: this box of it, mirrored or not."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class Header(NamedTuple):
    """What a JPEG says of itself.

    Attributes:
        height: of the image.
        width: of the image.
        place: of the two bytes in the file that give the height.
        sequential: whether the rows are stored from the top down.
    """

    height: int
    width: int
    place: int
    sequential: bool


def jpeg_header(content: bytes) -> Header | None:
    """The header of a grey or colour JPEG that has its end, or None: then :func:`decode` has to judge it."""
    if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
        return None
    place = 2
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, place + 4)
            usual = bits == 8 and height and width and channels in (1, 3)
            return Header(height, width, place + 5, marker in _SEQUENTIAL) if usual else None
        if marker in (_SCAN, 0xFF):  # no frame before the pixels; padding between markers
            return None
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None


def decode(content: bytes) -> Tensor:
    """RGB pixels ``[3, H, W]`` uint8, pixels contiguous (channels_last); grey and CMYK images are converted.

    Of 16 bits the upper 8 are taken, in grey images too, whose conversion Pillow would cut off at 255.

    Raises:
        OSError, ValueError, SyntaxError: not an image, a damaged one, or one of pixels without a known range.
    """
    pixels: Any
    if simplejpeg is not None and content[:2] == b"\xff\xd8":
        try:
            pixels = simplejpeg.decode_jpeg(content, "RGB")
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except ValueError:
            pass  # for Pillow to judge
    try:
        with warnings.catch_warnings():
            # Of a palette's transparency, of a size that is large but allowed: two lines for an image that is right,
            # in every worker, which do not name it.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                pixels = np.array(_in_8_bits(image).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError("not an image that Pillow knows") from error  # its own words differ from call to call
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits have no known range: save it with 8 bits a channel")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I;16") else image


def decode_box(content: bytes, header: Header, view: View) -> Tensor:
    """The box of a JPEG, ``[3, height, width]`` uint8, a copy; equal to that part of :func:`decode`.

    Rows far below the box are not decoded: the header is changed to end the image there. Damage to them goes unnoticed,
    and what libjpeg mends in the box is taken as mended, as Pillow takes it.

    Raises:
        OSError, ValueError, SyntaxError: a damaged image.
    """
    rows = view.top + view.height + _ROWS_BELOW
    if simplejpeg is None or not header.sequential or rows >= header.height:
        pixels = decode(content).permute(1, 2, 0).numpy()
    else:
        shortened = b"".join((content[: header.place], rows.to_bytes(2, "big"), content[header.place + 2 :]))
        pixels = simplejpeg.decode_jpeg(shortened, "RGB", strict=False)  # strict: data after the last row are an error
    box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    return torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)


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
    return resize_box(image[:, view.top : view.top + view.height, view.left : view.left + view.width], view.flip, size)


def resize_box(box: Tensor, flip: bool, size: int) -> Tensor:
    """A box ``[3, h, w]``, mirrored if so wanted, as ``[3, size, size]``. Fastest on contiguous pixels."""
    resized: Tensor = transforms().resize(box, [size, size], antialias=True)
    return resized.flip(2) if flip else resized


def eval_image(image: Tensor, resize: int, size: int) -> Tensor:
    """The middle ``[3, size, size]`` of an image whose shorter side was resized to ``resize``."""
    resized = transforms().resize(image, [resize], antialias=True)
    middle: Tensor = transforms().center_crop(resized, [size, size])
    return middle
