"""A data set in memory and its loaders: no worker processes, no copies, the augmentation is part of the step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdistiller_norm.data.augment import PadCropFlip, normalise
from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader, Warn
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import ConfigError, DataError
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

    def fingerprint(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.images.cpu().contiguous().numpy().data).hexdigest()

    def to(self, device: torch.device) -> Split:
        """The same split with its tensors on that device."""
        return Split(self.images.to(device), self.targets.to(device))


@dataclass(frozen=True)
class TensorDataset(Dataset):
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
        variant: which networks fit its images.
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
        """See that it is as said above.

        Raises:
            DataError: it is not. Some of that would train all the same, and on something else: pixels in [0, 1] are
                taken for black, and images behind the last target are left out.
        """
        if not all(isinstance(label, str) for label in self.classes):
            raise DataError(f"{self.name}: its classes are {self.classes!r}: they must be text")
        for word, split in (("training", self.train), ("test", self.test)):
            self._check_split(word, split)
        constants = [*self.mean, *self.std]
        if not (len(self.mean) == len(self.std) == 3 and 0 <= min(constants) <= max(constants) <= 1 and min(self.std)):
            raise DataError(
                f"{self.name}: its mean is {self.mean} and its std {self.std}: they must be those of the three "
                "channels, of pixels in [0, 1], and no std may be 0"
            )
        if self.padding < 0:
            raise DataError(f"{self.name}: its padding is {self.padding}: it must be zero or positive")

    def _check_split(self, word: str, split: Split) -> None:
        images, targets = split.images, split.targets
        if not (_is(images, torch.uint8) and images.ndim == 4 and images.shape[3] == 3 and images.numel()):
            raise DataError(
                f"{self.name}: its {word} images are {_kind(images)}: they must be a tensor [N, H, W, 3] of uint8, "
                "at least one image"
            )
        if not (_is(targets, torch.int64) and targets.shape == images.shape[:1]):
            raise DataError(
                f"{self.name}: its {word} targets are {_kind(targets)}: they must be a tensor [{len(images)}] of "
                "int64, a class for each image"
            )
        least, largest = (int(end) for end in targets.aminmax())
        if least < 0 or largest >= len(self.classes):
            raise DataError(
                f"{self.name}: its {word} targets are {least} .. {largest}: the numbers of its {len(self.classes)} "
                f"classes are 0 .. {len(self.classes) - 1}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.train.images.shape[1], self.train.images.shape[2]

    @property
    def targets(self) -> Tensor:
        """See :class:`Dataset`."""
        return self.train.targets.cpu()

    def fingerprint(self) -> str:
        """See :class:`Dataset`: with the pixels."""
        return hashlib.sha256(f"{super().fingerprint()} {self.train.fingerprint()}".encode()).hexdigest()

    def to(self, device: torch.device) -> TensorDataset:
        """The same data set with its tensors on that device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def hold_out(self, fraction: float) -> TensorDataset:
        """Part of the training split in the place of the test split, for choosing hyper-parameters.

        Args:
            fraction: of the samples of each class, rounded; which ones depends on nothing else.

        Raises:
            ConfigError: that is none of any class.
        """
        targets = self.targets
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        by_class = [order[targets[order] == label] for label in range(len(self.classes))]
        counts = [round(fraction * len(members)) for members in by_class]
        if not any(counts):
            raise ConfigError(f"DATASET.VAL_SPLIT {fraction} holds out no image of any class of {self.name}: raise it")
        held, kept = (
            torch.cat(parts).sort().values.to(self.train.targets.device)
            for parts in (
                [members[:count] for members, count in zip(by_class, counts, strict=True)],
                [members[count:] for members, count in zip(by_class, counts, strict=True)],
            )
        )
        test, train = (Split(self.train.images[part], self.train.targets[part]) for part in (held, kept))
        return replace(self, train=train, test=test)

    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE, warn: Warn = print
    ) -> MemoryTrainLoader:
        """See :class:`Dataset`."""
        return MemoryTrainLoader(replace(self, train=self.train.to(device)), batch_size, seed, share)

    def eval_loader(self, batch_size: int, device: torch.device, share: Share = ALONE) -> MemoryEvalLoader:
        """See :class:`Dataset`."""
        return MemoryEvalLoader(replace(self, test=self.test.to(device)), batch_size, share)


def _is(value: object, dtype: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dtype == dtype


def _kind(value: object) -> str:
    """What an error calls it."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


class MemoryTrainLoader(TrainLoader):
    """Augmented training batches. The last, short batch of an epoch is kept.

    Args:
        dataset: on the device that trains.
        batch_size: samples of one step over all processes.
        seed: of the order and the augmentation.
        share: this process among those that train together.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int, seed: int, share: Share = ALONE) -> None:
        super().__init__(len(dataset.train), batch_size, seed, share)
        self.augment = PadCropFlip(dataset.padding, dataset.flip)
        self.views = self.augment.views
        self._images, self._targets = dataset.train.images, dataset.train.targets
        device = self._targets.device
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Indices ``[B]``, views ``[B]`` and the key of every batch."""
        device = self._targets.device
        plan = epoch_plan(self.seed, epoch, self.samples, self.augment.views)
        order, views = plan.order.to(device), plan.views.to(device)
        keys = torch.arange(self.steps, device=device) + plan.key
        for step in range(first_step, self.steps):
            mine = self.part(step).rows
            yield order[mine], views[mine], keys[step]

    def fingerprint(self) -> str:
        """SHA-256 of everything that an augmented image is made from."""
        pixels = Split(self._images, self._targets).fingerprint()
        made = f"{self.augment} {self._mean.tolist()} {self._std.tolist()} {pixels}"
        return hashlib.sha256(made.encode()).hexdigest()

    def prepare(self, *raw: Tensor) -> Batch:
        """See :class:`TrainLoader`."""
        indices, views, key = raw
        images = normalise(self.augment(self._images, indices, views), self._mean, self._std)
        return Batch(images, self._targets[indices], indices, views, key)


class MemoryEvalLoader(EvalLoader):
    """The test split, normalised batch by batch.

    Args:
        dataset: on the device that evaluates.
        batch_size: samples at a time.
        share: this process among those that evaluate together.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int, share: Share = ALONE) -> None:
        self._split, self.batch_size = dataset.test, batch_size
        self._mine = eval_share(len(dataset.test), share)
        device = self._split.targets.device
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(self._mine.start, self._mine.stop, self.batch_size):
            batch = slice(first, min(first + self.batch_size, self._mine.stop))
            yield normalise(self._split.images[batch], self._mean, self._std), self._split.targets[batch]

    def __len__(self) -> int:
        return len(self._split)
