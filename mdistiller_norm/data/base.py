"""Interfaces of data sets and of their two loaders."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from mdistiller_norm.data.augment import Normalise
from mdistiller_norm.data.plan import ALONE, Part, Share, share_out
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch

Tensors = tuple[Tensor, ...]


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
        hidden: image files that are left out because a name begins with a dot.
    """

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variant: str
    hidden: int = 0

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
        classes = "\0".join(self.classes).encode()
        return hashlib.sha256(classes + self.targets.numpy().tobytes()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """Return the part of a student's metadata that the data set determines."""
        return {
            "variant": self.variant,
            "dataset": self.name,
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": list(self.image_size),
        }

    def summary(self) -> str:
        sizes = f"{len(self.train)} + {len(self.test)} images"
        return f"{self.name}: {len(self.classes)} classes, {sizes}"

    def unreadable(self, train: bool = True, share: Share = ALONE) -> list[str]:
        """Read this process's share of the test files and, with ``train``, of all; return the unreadable ones."""
        return []

    def hold_out(self, fraction: float) -> Self:
        """Replace the test split by a fixed fraction of the training samples of each class, rounded."""
        sizes = torch.bincount(self.targets, minlength=len(self.classes)).double()
        held = self._choose((fraction * sizes).round().int().tolist())
        if not held.any():
            raise ConfigError(f"DATASET.VAL_SPLIT {fraction} holds out no image of {self.name}")
        other = copy.copy(self)
        other.train, other.test = self.train[~held], self.train[held]
        return other

    def subset(self, count: int) -> Self:
        """Reduce the training split to ``count`` samples, equally many of each class that has enough."""
        number = len(self.classes)
        if count < number:
            raise ConfigError(f"DATASET.SUBSET must be >= {number}, one per class, got {count}")
        other = copy.copy(self)
        chosen = self._choose([(count + number - 1 - label) // number for label in range(number)])
        other.train = self.train[chosen]
        return other

    def _choose(self, numbers: Sequence[int]) -> Tensor:
        # A mask [N] of that many training samples of each class.
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        chosen = torch.zeros(len(self.train), dtype=torch.bool)
        targets = self.targets[order]
        for label, number in enumerate(numbers):
            chosen[order[targets == label][:number]] = True
        return chosen

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE
    ) -> TrainLoader:
        """Return the loader of this process's part of the training batches, on ``device``."""

    @abstractmethod
    def eval_loader(
        self, batch_size: int, device: torch.device, share: Share = ALONE
    ) -> EvalLoader:
        """Return a loader of this process's share of the test split."""


class TrainLoader(ABC):
    """Training batches; each random choice is a function of (seed, epoch, position in the epoch).

    ``batches`` yields the raw tensors of a batch (indices, or decoded images). ``prepare`` turns them into a batch
    inside the training step, on the device, where it can be compiled or captured with the rest of the step.

    Attributes:
        global_batch_size: samples of one step over all processes.
        batch_size: samples of this process in a full batch.
        steps: batches of an epoch; the last one may be short.
        on_device: whether the images are stored on the device.
        warn: called with each warning.
    """

    on_device: bool = False
    warn: Callable[[str], None] = print

    def __init__(self, samples: int, batch_size: int, seed: int, share: Share = ALONE) -> None:
        self.samples, self.seed, self.share = samples, seed, share
        self.global_batch_size = batch_size
        self.batch_size = batch_size // share.world
        self.steps = -(-samples // batch_size)

    def part(self, step: int) -> Part:
        first = step * self.global_batch_size
        return share_out(first, min(self.global_batch_size, self.samples - first), self.share)

    @abstractmethod
    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        """Yield the raw batches of an epoch (counted from 1), starting at ``first_step`` (counted from 0)."""

    @abstractmethod
    def prepare(self, *raw: Tensor) -> Batch:
        """Build the batch from its raw tensors, with operations of static shape only."""


class EvalLoader:
    """Normalised images ``[B, 3, H, W]`` and targets ``[B]`` of this process's share of the test split, in order.

    Args:
        batches: sized iterable of images ``[B, H, W, 3]`` uint8 and targets ``[B]``.
        on_device: whether the images are stored on the device.
    """

    def __init__(self, batches: Any, normalise: Normalise, on_device: bool = False) -> None:
        self._batches, self._normalise, self.on_device = batches, normalise, on_device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, *_ in self._batches:
            yield self._normalise(images), targets

    def __len__(self) -> int:
        return len(self._batches)
