"""Data sets in memory: no worker processes and no copies, and the augmentation is part of the training step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mdistiller_norm.data.augment import PadCropFlip, normalise
from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader, Warn
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.types import Batch


@dataclass(frozen=True)
class Split:
    """Images ``[N, H, W, 3]`` uint8 and class numbers ``[N]`` int64. Channels come last for fast cropping."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.targets[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the pixels."""
        return hashlib.sha256(self.images.cpu().contiguous().numpy().data).hexdigest()

    def to(self, device: torch.device) -> Split:
        """Return the split with its tensors on a device."""
        return Split(self.images.to(device), self.targets.to(device))


@dataclass(frozen=True)
class TensorDataset(Dataset):
    """A data set in memory, as uint8 tensors.

    Attributes:
        train: training split.
        test: split that accuracy is measured on.
        padding: zero pixels added on each side before a random crop of the original size.
        flip: whether half of the training images are mirrored.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 4
    flip: bool = True
    variant: str = "cifar"

    def check(self) -> None:
        """Check types, shapes and ranges; several wrong ones would train without an error, on wrong data."""
        if not all(isinstance(label, str) for label in self.classes):
            raise DataError(f"{self.name}: classes must be strings, got {self.classes!r}")
        for values in (self.mean, self.std):
            if np.shape(values) != (3,) or not 0 <= min(values) <= max(values) <= 1 or not min(self.std):
                raise DataError(
                    f"{self.name}: mean and std must be 3 values in [0, 1], and std > 0, got {self.mean} and {self.std}"
                )
        if self.padding < 0:
            raise DataError(f"{self.name}: padding must be >= 0, got {self.padding}")
        for name, split in (("training", self.train), ("test", self.test)):
            _check_split(f"{self.name}: {name}", split, len(self.classes))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[1], self.train.images.shape[2]

    @property
    def targets(self) -> Tensor:
        return self.train.targets.cpu()

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.train.fingerprint()}".encode()).hexdigest()

    def hold_out(self, fraction: float) -> TensorDataset:
        """Replace the test split by a part of the training split, to choose hyper-parameters.

        Args:
            fraction: share of the samples of each class, rounded. The chosen samples depend on nothing else.
        """
        targets = self.targets
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        held = torch.zeros(len(targets), dtype=torch.bool)
        for label in range(len(self.classes)):
            members = order[targets[order] == label]
            held[members[: round(fraction * len(members))]] = True
        if not held.any():
            raise ConfigError(
                f"DATASET.VAL_SPLIT {fraction} holds out no image of any class of {self.name}: raise it"
            )
        held = held.to(self.train.targets.device)
        return replace(self, train=self.train[~held], test=self.train[held])

    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE, warn: Warn = print
    ) -> MemoryTrainLoader:
        return MemoryTrainLoader(replace(self, train=self.train.to(device)), batch_size, seed, share)

    def eval_loader(self, batch_size: int, device: torch.device, share: Share = ALONE) -> MemoryEvalLoader:
        return MemoryEvalLoader(replace(self, test=self.test.to(device)), batch_size, share)


def _check_split(name: str, split: Split, classes: int) -> None:
    images: object = split.images
    targets: object = split.targets
    shape = images.shape if isinstance(images, Tensor) and images.dtype == torch.uint8 else ()
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise DataError(
            f"{name} images must be a non-empty uint8 tensor [N, H, W, 3], got {_describe(images)}"
        )
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != shape[:1]:
        raise DataError(f"{name} targets must be an int64 tensor [{shape[0]}], got {_describe(targets)}")
    least, largest = (int(bound) for bound in targets.aminmax())
    if least < 0 or largest >= classes:
        raise DataError(f"{name} targets must be in 0..{classes - 1}, got {least}..{largest}")


def _describe(value: object) -> str:
    return f"{type(value).__name__} {getattr(value, 'dtype', '')} {list(getattr(value, 'shape', []))}"


class MemoryTrainLoader(TrainLoader):
    """Augmented training batches of a data set, on its device. The last, short batch of an epoch is kept."""

    views: int

    def __init__(self, dataset: TensorDataset, batch_size: int, seed: int, share: Share = ALONE) -> None:
        super().__init__(len(dataset.train), batch_size, seed, share)
        self.augment = PadCropFlip(dataset.padding, dataset.flip)
        self.views = self.augment.views
        self._train = dataset.train
        device = dataset.train.targets.device
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (dataset.mean, dataset.std)
        )

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield indices ``[B]``, views ``[B]`` and the key of each batch."""
        device = self._train.targets.device
        plan = epoch_plan(self.seed, epoch, self.samples, self.views)
        order, views = plan.order.to(device), plan.views.to(device)
        keys = torch.arange(self.steps, device=device) + plan.key
        for step in range(first_step, self.steps):
            rows = self.part(step).rows
            yield order[rows], views[rows], keys[step]

    def fingerprint(self) -> str:
        """Return a SHA-256 that identifies the augmented images."""
        content = f"{self.augment} {self._mean.tolist()} {self._std.tolist()} {self._train.fingerprint()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def prepare(self, *raw: Tensor) -> Batch:
        indices, views, key = raw
        images = normalise(self.augment(self._train.images, indices, views), self._mean, self._std)
        return Batch(images, self._train.targets[indices], indices, views, key)


class MemoryEvalLoader(EvalLoader):
    """Normalised test batches of a data set, on its device."""

    def __init__(self, dataset: TensorDataset, batch_size: int, share: Share = ALONE) -> None:
        self._test, self._rows = dataset.test, eval_share(len(dataset.test), share)
        self.batch_size = batch_size
        device = dataset.test.targets.device
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (dataset.mean, dataset.std)
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(self._rows.start, self._rows.stop, self.batch_size):
            batch = self._test[first : min(first + self.batch_size, self._rows.stop)]
            yield normalise(batch.images, self._mean, self._std), batch.targets

    def __len__(self) -> int:
        return len(self._test)
