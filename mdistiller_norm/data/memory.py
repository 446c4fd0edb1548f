"""Loaders over a data set in memory: no worker processes, no copies, the augmentation is part of the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mdistiller_norm.data.augment import PadCropFlip, normalise
from mdistiller_norm.data.base import EvalLoader, TensorDataset, TrainLoader
from mdistiller_norm.data.plan import epoch_plan
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch


class MemoryTrainLoader(TrainLoader):
    """Augmented training batches. The last, short batch of an epoch is kept.

    Args:
        dataset: on the device that trains.
        batch_size: of one step over all processes; every process takes its contiguous share of it.
        seed: of the order and the augmentation.
        rank: of this process.
        world: number of processes.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """

    def __init__(self, dataset: TensorDataset, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        samples = len(dataset.train)
        if batch_size % world:
            raise ConfigError(f"SOLVER.BATCH_SIZE {batch_size} cannot be split evenly over {world} processes")
        if samples % batch_size % world:
            raise ConfigError(
                f"the last batch of an epoch has {samples % batch_size} samples, which cannot be split evenly over "
                f"{world} processes: choose another SOLVER.BATCH_SIZE or number of processes"
            )
        self.global_batch_size, self.batch_size = batch_size, batch_size // world
        self.steps = -(-samples // batch_size)
        self.seed, self.rank, self.world = seed, rank, world
        self.augment = PadCropFlip(dataset.padding, dataset.flip)
        self._padded = self.augment.pad(dataset.train.images)
        self._targets = dataset.train.targets
        device = self._targets.device
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Indices ``[B]``, views ``[B]`` and the key of every batch."""
        samples, device = len(self._targets), self._targets.device
        plan = epoch_plan(self.seed, epoch, samples, self.augment.views)
        order, views = plan.order.to(device), plan.views.to(device)
        keys = torch.arange(self.steps, device=device) + plan.key
        for step in range(first_step, self.steps):
            first = step * self.global_batch_size
            share = (min(first + self.global_batch_size, samples) - first) // self.world
            mine = slice(first + self.rank * share, first + (self.rank + 1) * share)
            yield order[mine], views[mine], keys[step]

    def prepare(self, *raw: Tensor) -> Batch:
        """See :class:`TrainLoader`."""
        indices, views, key = raw
        images = normalise(self.augment(self._padded, indices, views), self._mean, self._std)
        return Batch(images, self._targets[indices], indices, views, key)


class MemoryEvalLoader(EvalLoader):
    """The test split, normalised batch by batch."""

    def __init__(self, dataset: TensorDataset, batch_size: int) -> None:
        self._split, self.batch_size = dataset.test, batch_size
        device = self._split.targets.device
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self), self.batch_size):
            batch = slice(first, first + self.batch_size)
            yield normalise(self._split.images[batch], self._mean, self._std), self._split.targets[batch]

    def __len__(self) -> int:
        return len(self._split)
