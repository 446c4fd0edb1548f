"""What a worker makes of a batch of encoded images: it decodes, crops and resizes into one tensor in shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from mdistiller_norm.data.class_tree import ImageSplit
from mdistiller_norm.data.decode import (
    UNREADABLE,
    Header,
    View,
    decode,
    decode_box,
    draw_view,
    eval_image,
    jpeg_header,
    resize_box,
    train_image,
)

GROUP = 64  # images that a worker opens, then decodes, then resizes: a tenth faster than one image after the other
LARGE = 2**19  # pixels of a box that is resized as soon as it is decoded


@dataclass(frozen=True)
class ImageOptions:
    """How images of a folder are read.

    Attributes:
        size: height and width of what a network sees.
        resize: what the shorter side is resized to before the central crop of an evaluation.
        crop_scale: least and largest share of the area that a random crop keeps.
        mean: of the channels, of pixels in [0, 1]; empty for the data set's constants, or to measure it.
        std: likewise.
        classes: names of the class folders in the order of the class numbers; empty for all of them, sorted.
        variant: "cifar" or "imagenet" networks; "auto" takes the latter for images above 64 pixels.
        workers: processes that read images; 0 to read them in the process that trains.
        max_broken: unreadable training files that are replaced by other samples before the run fails.
        train: whether the training split is needed.
    """

    size: int = 224
    resize: int = 256
    crop_scale: tuple[float, float] = (0.08, 1.0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    variant: str = "auto"
    workers: int = 2
    max_broken: int = 10
    train: bool = True


# What a worker is asked for: the key of the epoch and the numbers of the samples.
Task = tuple[int, Sequence[int]]


class Made(NamedTuple):
    """A batch without its key.

    Attributes:
        images: ``[B, size, size, 3]`` uint8.
        targets: ``[B]`` int64.
        indices: numbers of the samples, ``[B]`` int64.
        broken: names of unreadable files, with the reason.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    broken: list[str]


class Opened(NamedTuple):
    """A JPEG that is read, and the view of it that is wanted."""

    content: bytes
    header: Header
    view: View


class TrainReader(TorchDataset[Any]):
    """Training batches. A sample whose file is unreadable is replaced by another one, the same every time."""

    def __init__(self, split: ImageSplit, options: ImageOptions) -> None:
        self.split, self.options = split, options

    def __getitem__(self, task: Task) -> Any:
        key, wanted = task
        indices, broken = list(wanted), list[str]()
        images = _shared(len(indices), self.options.size)
        for first in range(0, len(wanted), GROUP):
            opened = [self.open(key, index) for index in wanted[first : first + GROUP]]
            boxes = [_box(one, self.options.size) for one in opened]
            for row, (one, box) in enumerate(zip(opened, boxes, strict=True), first):
                if one is None or box is None:
                    indices[row], images[row] = self.view(key, wanted[row], broken)
                else:
                    images[row] = resize_box(box, one.view.flip, self.options.size).permute(1, 2, 0)
        numbers = torch.tensor(indices)
        return Made(images, self.split.targets[numbers], numbers, broken)

    def open(self, key: int, index: int) -> Opened | None:
        """The sample and its view, undecoded; None for what is no sound JPEG, which :meth:`view` has to make."""
        try:
            content = self.split.source.read(index)
        except OSError:
            return None
        header = jpeg_header(content)
        if header is None:
            return None
        view = draw_view(_random(key, index), header.height, header.width, self.options.crop_scale)
        return Opened(content, header, view)

    def view(self, key: int, index: int, broken: list[str]) -> tuple[int, Tensor]:
        """The view of any sample, from the whole image.

        Args:
            key: of the epoch.
            index: number of the sample.
            broken: gets the names of files that cannot be read.

        Returns:
            The number of the sample that was taken, and the view ``[size, size, 3]``: zeros where none could be read.
        """
        random, size = _random(key, index), self.options.size
        for _ in range(self.options.max_broken + 1):
            image = _try_decode(self.split, index, broken)
            if image is not None:
                view = draw_view(random, image.shape[1], image.shape[2], self.options.crop_scale)
                return index, train_image(image, view, size).permute(1, 2, 0)
            index = int(random.integers(len(self.split.source)))
        return index, torch.zeros(size, size, 3, dtype=torch.uint8)


class EvalReader(TrainReader):
    """Evaluation batches."""

    def __getitem__(self, task: Task) -> Made:
        numbers, broken = torch.tensor(task[1]), list[str]()
        images = _shared(len(numbers), self.options.size)
        for row, index in enumerate(task[1]):
            image = _try_decode(self.split, index, broken)
            if image is not None:
                images[row] = eval_image(image, self.options.resize, self.options.size).permute(1, 2, 0)
        return Made(images, self.split.targets[numbers], numbers, broken)


class CheckReader(TrainReader):
    """No images, only the names of the unreadable ones."""

    def __getitem__(self, task: Task) -> list[str]:
        broken: list[str] = []
        for index in task[1]:
            _try_decode(self.split, index, broken)
        return broken


def _random(key: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))


def _box(opened: Opened | None, size: int) -> Tensor | None:
    """The box of a sample; a large one in its final size, so that a group of photographs fits into memory."""
    if opened is None:
        return None
    try:
        box = decode_box(*opened)
    except UNREADABLE:
        return None
    return resize_box(box, False, size) if box.shape[1] * box.shape[2] > LARGE else box


def _try_decode(split: ImageSplit, index: int, broken: list[str]) -> Tensor | None:
    try:
        return decode(split.source.read(index))
    except UNREADABLE as error:
        broken.append(f"{split.source.name(index)} ({error})")
        return None


def _shared(count: int, size: int) -> Tensor:
    """Memory that the training process sees without another copy."""
    return torch.empty(count, size, size, 3, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call,no-any-return]
