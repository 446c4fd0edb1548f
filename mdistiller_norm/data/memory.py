"""Data sets in memory: no worker processes and no copies, and the augmentation is part of the training step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdistiller_norm.data.augment import Normalise, PadCropFlip
from mdistiller_norm.data.base import Dataset, EvalLoader, Tensors, TrainLoader
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import DataError
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
        return hashlib.sha256(self.images.cpu().contiguous().numpy().data).hexdigest()

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.targets.to(device))

    def check(self, name: str, classes: int) -> None:
        pair = self.images, self.targets
        dtypes = [getattr(each, "dtype", type(each).__name__) for each in pair]
        images, targets = (list(getattr(each, "shape", ())) for each in pair)
        right = dtypes == [torch.uint8, torch.int64] and targets == images[:1]
        if not right or images[3:] != [3] or 0 in images:
            got = f"{dtypes[0]} {images} and {dtypes[1]} {targets}"
            raise DataError(f"{name} must be uint8 [N, H, W, 3] and int64 [N], got {got}")
        check_range(self.targets, classes, f"{name} targets")


def check_range(targets: Tensor, classes: int, name: str) -> None:
    """Check that all targets are class numbers."""
    least, largest = (int(bound) for bound in targets.aminmax())
    if least < 0 or largest >= classes:
        raise DataError(f"{name} must be in 0..{classes - 1}, got {least}..{largest}")


@dataclass(eq=False)
class TensorDataset(Dataset):
    """A data set in memory, as uint8 tensors.

    Attributes:
        padding: zero pixels added on each side before a random crop of the original size.
        flip: whether half of the training images are mirrored.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 4
    flip: bool = True
    variant: str = "cifar"

    def check(self) -> None:
        if not all(isinstance(label, str) for label in self.classes):
            raise DataError(f"{self.name}: classes must be strings, got {self.classes!r}")
        values = [*self.mean, *self.std]
        if len(values) != 6 or not 0 <= min(values) <= max(values) <= 1 or 0 in self.std:
            raise DataError(
                f"{self.name}: mean and std need 3 values in [0, 1], std > 0, got {values}"
            )
        self.train.check(f"{self.name}: training", len(self.classes))
        self.test.check(f"{self.name}: test", len(self.classes))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[1], self.train.images.shape[2]

    def fingerprint(self) -> str:
        both = f"{super().fingerprint()} {self.train.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()

    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE
    ) -> MemoryTrainLoader:
        dataset = replace(self, train=self.train.to(device))
        return MemoryTrainLoader(dataset, batch_size, seed, share)

    def eval_loader(
        self, batch_size: int, device: torch.device, share: Share = ALONE
    ) -> EvalLoader:
        rows = eval_share(len(self.test), share)
        part = self.test[rows.start : rows.stop].to(device)
        parts = [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
        batches = [(batch.images, batch.targets) for batch in parts]
        return EvalLoader(batches, Normalise(self.mean, self.std, device), on_device=True)


class MemoryTrainLoader(TrainLoader):
    """Augmented training batches of a data set, on its device. The last, short batch of an epoch is kept."""

    on_device = True

    def __init__(
        self, dataset: TensorDataset, batch_size: int, seed: int, share: Share = ALONE
    ) -> None:
        super().__init__(len(dataset.train), batch_size, seed, share)
        self.augment = PadCropFlip(dataset.padding, dataset.flip)
        self._train, self._device = dataset.train, dataset.train.targets.device
        self._normalise = Normalise(dataset.mean, dataset.std, self._device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        order, views, key = epoch_plan(self.seed, epoch, self.samples, self.augment.views)
        order, views = order.to(self._device), views.to(self._device)
        keys = torch.arange(self.steps, device=self._device) + key
        for step in range(first_step, self.steps):
            rows = self.part(step).rows
            yield order[rows], views[rows], keys[step]

    def fingerprint(self) -> str:
        mean, std = self._normalise.mean.tolist(), self._normalise.std.tolist()
        inputs = f"{self.augment} {mean} {std} {self._train.fingerprint()}"
        return hashlib.sha256(inputs.encode()).hexdigest()

    def prepare(self, *raw: Tensor) -> Batch:
        indices, views, key = raw
        images = self._normalise(self.augment(self._train.images, indices, views))
        return Batch(images, self._train.targets[indices], indices, views, key)
