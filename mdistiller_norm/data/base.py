"""What a data set is, and what the trainer asks of the two loaders made from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdistiller_norm.types import Batch


@dataclass(frozen=True)
class Split:
    """Part of a data set, in memory.

    Attributes:
        images: ``[N, H, W, 3]`` uint8. Channels come last so that cropping copies whole pixels.
        targets: ``[N]`` int64 class numbers.
    """

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class TensorDataset:
    """A data set small enough to live in memory as uint8.

    Attributes:
        name: its ``DATASET.TYPE``.
        train: the training split.
        test: the split that accuracy is measured on.
        classes: class names, in the order of the class numbers.
        mean: of the channels, of pixels in [0, 1].
        std: likewise.
        padding: zero pixels added on each side before a random crop of the original size.
        flip: whether a training image is mirrored half of the time.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 4
    flip: bool = True

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.train.images.shape[1], self.train.images.shape[2]

    def to(self, device: torch.device) -> TensorDataset:
        """The same data set with its tensors on that device."""
        train, test = (Split(split.images.to(device), split.targets.to(device)) for split in (self.train, self.test))
        return TensorDataset(self.name, train, test, self.classes, self.mean, self.std, self.padding, self.flip)


class TrainLoader(ABC):
    """Training batches whose every random choice is a function of (seed, epoch, rank).

    A batch is made in two parts: ``batches`` yields what names it (index tensors, or decoded images), and ``prepare``
    turns that into images inside the training step, on the device, where it can be compiled or captured with the rest.

    Attributes:
        batch_size: samples in a full batch of this process.
        steps: batches an epoch, the last one possibly short.
    """

    batch_size: int
    steps: int

    @abstractmethod
    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """What names the batches of an epoch (counted from 1), from ``first_step`` (counted from 0) on."""

    @abstractmethod
    def prepare(self, *raw: Tensor) -> Batch:
        """The batch of that name: tensor operations of static shape only."""


class EvalLoader(ABC):
    """Every sample of the test split once, in order."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[B, 3, H, W]`` and targets ``[B]``."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""
