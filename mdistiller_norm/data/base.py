"""Interfaces of data sets and of their two loaders."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from mdistiller_norm.data.augment import Normalise
from mdistiller_norm.data.plan import ALONE, Part, Share, share_out
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch

Warn = Callable[[str], None]


class Dataset(ABC):
    """A training split and a test split.

    Attributes:
        name: name in checkpoints and results.
        train: training split; ``train[rows]`` is the part that a bool tensor ``[N]`` selects.
        test: split that accuracy is measured on.
        classes: class names, in the order of the class numbers.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel.
        variant: kind of networks that fits the images, a name of :data:`mdistiller_norm.models.VARIANTS`.
    """

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variant: str

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of a network's input."""

    @property
    def targets(self) -> Tensor:
        """Class of every training sample, ``[N]`` int64, on the CPU."""
        return torch.as_tensor(self.train.targets).cpu()

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the training split, from at least the classes and targets."""
        return hashlib.sha256("\0".join(self.classes).encode() + self.targets.numpy().tobytes()).hexdigest()

    def summary(self) -> str:
        return f"{self.name}: {len(self.classes)} classes, {len(self.train)} + {len(self.test)} images"

    def unreadable(self, train: bool = True, share: Share = ALONE) -> list[str]:
        """Read this process's share of the test files and, with ``train``, of all; return the unreadable ones."""
        return []

    def hold_out(self, fraction: float) -> Self:
        """Replace the test split by a fixed fraction of the training samples of each class, rounded."""
        held = self._choose(lambda label, size: round(fraction * size))
        if not held.any():
            raise ConfigError(f"DATASET.VAL_SPLIT {fraction} holds out no image of any class of {self.name}")
        other = copy.copy(self)
        other.train, other.test = self.train[~held], self.train[held]
        return other

    def subset(self, count: int) -> Self:
        """Reduce the training split to ``count`` samples, equally many of each class that has enough."""
        classes = len(self.classes)
        if count < classes:
            raise ConfigError(f"DATASET.SUBSET must be >= {classes}, the number of classes, got {count}")
        other = copy.copy(self)
        other.train = self.train[self._choose(lambda label, size: (count + classes - 1 - label) // classes)]
        return other

    def _choose(self, number: Callable[[int, int], int]) -> Tensor:
        # A mask [N] of number(label, size) training samples of each class of that size.
        targets = self.targets
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        chosen = torch.zeros(len(targets), dtype=torch.bool)
        for label in range(len(self.classes)):
            members = order[targets[order] == label]
            chosen[members[: number(label, len(members))]] = True
        return chosen

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE, warn: Warn = print
    ) -> TrainLoader:
        """Return a :class:`TrainLoader` of batches on ``device``; ``warn`` is called with each warning."""

    @abstractmethod
    def eval_loader(self, batch_size: int, device: torch.device, share: Share = ALONE) -> EvalLoader:
        """Return a loader of this process's share of the test split."""


class TrainLoader(ABC):
    """Training batches; each random choice is a function of (seed, epoch, position in the epoch).

    ``batches`` yields the raw tensors of a batch (indices, or decoded images). ``prepare`` turns them into a batch
    inside the training step, on the device, where it can be compiled or captured with the rest of the step.

    Attributes:
        global_batch_size: samples of one step over all processes.
        batch_size: samples of this process in a full batch.
        steps: batches of an epoch; the last one may be short.
        views: number of views of an image; None if the augmentation has no finite set of views.
        on_device: whether the images are stored on the device.
    """

    views: int | None = None
    on_device: bool = False

    def __init__(self, samples: int, batch_size: int, seed: int, share: Share = ALONE) -> None:
        self.samples, self.seed, self.share = samples, seed, share
        self.global_batch_size = batch_size
        self.batch_size = batch_size // share.world
        self.steps = -(-samples // batch_size)

    def part(self, step: int) -> Part:
        first = step * self.global_batch_size
        return share_out(first, min(self.global_batch_size, self.samples - first), self.share)

    @abstractmethod
    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the raw batches of an epoch (counted from 1), starting at ``first_step`` (counted from 0)."""

    @abstractmethod
    def prepare(self, *raw: Tensor) -> Batch:
        """Build the batch from its raw tensors, with operations of static shape only."""


class EvalLoader(ABC):
    """Normalised images ``[B, 3, H, W]`` and targets ``[B]`` of this process's share of the test split, in order."""

    def __init__(self, samples: int, normalise: Normalise) -> None:
        self._samples, self._normalise = samples, normalise

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, *_ in self.batches():
            yield self._normalise(images), targets

    def __len__(self) -> int:
        return self._samples  # over all processes

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield images ``[B, H, W, 3]`` uint8 and targets ``[B]``."""
