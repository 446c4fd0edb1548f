"""What a data set is, and what the trainer asks of the two loaders made from it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mdistiller_norm.data.plan import ALONE, Part, Share, share_out
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch

Warn = Callable[[str], None]


class Dataset(ABC):
    """A training and a test split: what the builders and the tools ask of any data set.

    Attributes:
        name: what checkpoints and results call it.
        classes: class names, in the order of the class numbers.
        mean: of the channels, of pixels in [0, 1].
        std: likewise.
        variant: which networks fit its images, a name of :data:`mdistiller_norm.models.VARIANTS`.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    variant: str

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that a network sees."""

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """``[N]`` int64, the class of every training sample, on the CPU."""

    def fingerprint(self) -> str:
        """SHA-256 of what tells its training split from others, for runs that go on: classes and targets at least."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.targets.numpy().data)
        return digest.hexdigest()

    def summary(self) -> str:
        """What it holds, in a line."""
        return f"{self.name}: {len(self.classes)} classes, {len(self.targets)} training images"

    def unreadable(self) -> list[str]:
        """Names of the files of both splits that cannot be read, with the reason; reads all of them."""
        return []

    @abstractmethod
    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE, warn: Warn = print
    ) -> TrainLoader:
        """Training batches on that device.

        Args:
            batch_size: of one step over all processes.
            seed: of the order and the augmentation.
            device: where the batches are needed.
            share: this process among those that train together.
            warn: is told of what a person should know, a line each.

        Raises:
            ConfigError: the batch cannot be shared out evenly.
        """

    @abstractmethod
    def eval_loader(self, batch_size: int, device: torch.device, share: Share = ALONE) -> EvalLoader:
        """This process's share of the test split, in batches of at most ``batch_size``, on that device."""


class TrainLoader(ABC):
    """Training batches whose every random choice is a function of (seed, epoch, position in the epoch).

    A batch is made in two parts: ``batches`` yields what names it (index tensors, or decoded images), and ``prepare``
    turns that into images inside the training step, on the device, where it can be compiled or captured with the rest.

    Args:
        samples: of the training split.
        batch_size: samples of one step over all processes.
        seed: of the order and the augmentation.
        share: this process among those that train together.

    Attributes:
        batch_size: samples in a full batch of this process.
        steps: batches an epoch, the last one possibly short.
        views: how many outcomes the augmentation of an image has; None where they cannot be named.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """

    views: int | None = None

    def __init__(self, samples: int, batch_size: int, seed: int, share: Share = ALONE) -> None:
        if batch_size % share.world:
            raise ConfigError(f"SOLVER.BATCH_SIZE {batch_size} cannot be split evenly over {share.world} processes")
        self.samples, self.seed, self.share = samples, seed, share
        self.global_batch_size, self.batch_size = batch_size, batch_size // share.world
        self.steps = -(-samples // batch_size)

    def part(self, step: int) -> Part:
        """Which places of the epoch's order this process has in that step (counted from 0)."""
        first = step * self.global_batch_size
        return share_out(first, min(self.global_batch_size, self.samples - first), self.share)

    @abstractmethod
    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """What names the batches of an epoch (counted from 1), from ``first_step`` (counted from 0) on."""

    @abstractmethod
    def prepare(self, *raw: Tensor) -> Batch:
        """The batch of that name: tensor operations of static shape only."""


class EvalLoader(ABC):
    """Every sample of this process's share of the test split once, in order."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images ``[B, 3, H, W]`` and targets ``[B]``."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples over all processes."""
