"""Decoding by the batch on the device that trains: workers only read the files and choose the views.

torchvision decodes a list of JPEGs at once, on a GPU with nvJPEG; crop, resize and flip follow there. The pixels are
those of the decoder: on a GPU not libjpeg's to the bit. What torchvision cannot decode, the CPU does, as without this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdistiller_norm.data.base import Warn
from mdistiller_norm.data.decode import View, train_image
from mdistiller_norm.data.image_reader import Made, Task, TrainReader
from mdistiller_norm.errors import ConfigError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29
    decode_jpeg = None


class Encoded(NamedTuple):
    """What a worker gives.

    Attributes:
        content: uint8, all files of the batch, one after the other; of what is no JPEG the finished view instead.
        sizes: bytes of each, ``[B]`` int64.
        views: ``[B, 5]`` int64, a :class:`~mdistiller_norm.data.decode.View` each; zeros where it is finished.
        targets: ``[B]`` int64.
        indices: numbers of the samples, ``[B]`` int64.
        broken: names of unreadable files, with the reason.
        task: what was asked for.
    """

    content: Tensor
    sizes: Tensor
    views: Tensor
    targets: Tensor
    indices: Tensor
    broken: list[str]
    task: Task


class EncodedReader(TrainReader):
    """Training batches, undecoded where they are JPEGs."""

    def __getitem__(self, task: Task) -> Encoded:
        key, wanted = task
        indices, broken, parts, views = list(wanted), list[str](), [], []
        for row, index in enumerate(wanted):
            opened = self.open(key, index)
            if opened is None:
                indices[row], image = self.view(key, index, broken)
                parts.append(image.numpy().reshape(-1))
                views.append((0, 0, 0, 0, 0))
            else:
                parts.append(np.frombuffer(opened.content, np.uint8))
                views.append(opened.view)
        sizes, numbers = torch.tensor([len(part) for part in parts]), torch.tensor(indices)
        content = torch.from_numpy(np.concatenate(parts))
        return Encoded(content, sizes, torch.tensor(views), self.split.targets[numbers], numbers, broken, task)


class DeviceDecoder:
    """Makes of what :class:`EncodedReader` gives what :class:`TrainReader` would, with the images on the device.

    Args:
        reader: makes the views of what cannot be decoded on the device.
        device: where the batches are needed.
        warn: is told once that there are files which the device cannot decode.

    Raises:
        ConfigError: this torchvision has no decoder.
    """

    def __init__(self, reader: TrainReader, device: torch.device, warn: Warn) -> None:
        if decode_jpeg is None:
            raise ConfigError("this torchvision decodes no images: set DATASET.DECODE to cpu, or take an older one")
        self.reader, self.device, self.warn = reader, device, warn
        self._warned = False

    def __call__(self, encoded: Encoded) -> Made:
        """Decode, crop, resize and mirror a batch."""
        size, broken, indices = self.reader.options.size, encoded.broken, encoded.indices
        parts = torch.split(encoded.content, encoded.sizes.tolist())
        views = [View(top, left, h, w, bool(flip)) for top, left, h, w, flip in encoded.views.tolist()]
        jpegs = [row for row, view in enumerate(views) if view.height]
        decoded = dict(zip(jpegs, self._decode([parts[row] for row in jpegs]), strict=True))
        images = torch.empty(len(parts), size, size, 3, dtype=torch.uint8, device=self.device)
        key, wanted = encoded.task
        for row, (part, view) in enumerate(zip(parts, views, strict=True)):
            image = decoded.get(row)
            if image is not None:
                images[row] = train_image(image, view, size).permute(1, 2, 0)
            elif view.height:
                self._say(wanted[row])
                indices[row], image = self.reader.view(key, wanted[row], broken)
                images[row] = image
            else:
                images[row] = part.view(size, size, 3)
        return Made(images, self.reader.split.targets[indices], indices, broken)

    def _decode(self, jpegs: list[Tensor]) -> Sequence[Tensor | None]:
        """RGB pixels ``[3, H, W]`` uint8 on the device, None for what cannot be decoded there."""
        if not jpegs:
            return []
        if self.device.type == "cuda":
            # nvJPEG writes on a stream of its own, which does not wait for this one, and the memory that it is given
            # may be that of images which this one still resizes.
            torch.cuda.current_stream(self.device).synchronize()
        try:
            images: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=self.device)
            return images
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one of them, and it does not say which
            return [None] if len(jpegs) == 1 else [image for jpeg in jpegs for image in self._decode([jpeg])]

    def _say(self, index: int) -> None:
        if not self._warned:
            self._warned = True
            name = self.reader.split.source.name(index)
            self.warn(f"{name} cannot be decoded on the {self.device.type} device: the CPU decodes such files")
