"""Batches of encoded images, made by worker processes.

A worker makes a whole batch. Normalisation is part of the step, on the device. What happens to a sample is a function
of (seed, epoch, its number), so it does not matter how many workers and processes there are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mdistiller_norm.data.augment import normalise
from mdistiller_norm.data.base import EvalLoader, TrainLoader, Warn
from mdistiller_norm.data.class_tree import ImageSplit
from mdistiller_norm.data.decode import transforms
from mdistiller_norm.data.image_reader import CheckReader, EvalReader, ImageOptions, Made, Task, TrainReader
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import DataError
from mdistiller_norm.types import Batch

# A batch on the device: its tensors.
Tensors = tuple[Tensor, ...]


class Images(Protocol):
    """What the loaders read of a data set; see :class:`~mdistiller_norm.data.image_folder.ImageDataset`."""

    train: ImageSplit
    test: ImageSplit
    options: ImageOptions
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Tasks:
    """What a loader's workers are asked for in this epoch."""

    def __init__(self, tasks: Sequence[Task] = ()) -> None:
        self.now = tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


def _as_is(made: Any) -> Any:
    return made


def _start_worker(number: int, trainer: int) -> None:
    """Leave signals to the process that trains: they reach the whole group, and it still needs its workers to save.

    Workers end with the loader, when they find that the process that trains is gone, or by its own SIGTERM: that is how
    it ends them when it leaves on an error, and then it waits for them.
    """
    for caught in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(caught, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere signals do not tell who sent them: SIGTERM ends workers at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_await_end, args=(trainer,), daemon=True).start()


def _await_end(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _loader(reader: TrainReader, tasks: _Tasks, pin: bool) -> DataLoader[Any]:
    transforms()  # here: forked workers have it
    workers = reader.options.workers
    return DataLoader(
        reader,
        batch_size=None,  # a task is a batch
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        worker_init_fn=partial(_start_worker, trainer=os.getpid()),  # which need not be a worker's parent
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
    )


def unreadable(split: ImageSplit, options: ImageOptions) -> list[str]:
    """Names of the files of a split that cannot be read, with the reason; reads all of them."""
    count = len(split.source)
    tasks = _Tasks([(0, range(first, min(first + 64, count))) for first in range(0, count, 64)])
    return [name for broken in _loader(CheckReader(split, options), tasks, False) for name in broken]


class ImageTrainLoader(TrainLoader):
    """Augmented training batches, one ahead on the device. The last, short batch of an epoch is kept."""

    def __init__(
        self,
        dataset: Images,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: Share = ALONE,
        warn: Warn = print,
    ) -> None:
        super().__init__(len(dataset.train.source), batch_size, seed, share)
        options = dataset.options
        self.device, self.warn, self.max_broken = device, warn, options.max_broken
        self._tasks = _Tasks()
        self._reader = TrainReader(dataset.train, options)
        self._loader = _loader(self._reader, self._tasks, device.type == "cuda")
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)
        self._broken: set[str] = set()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        """Images ``[B, size, size, 3]`` uint8, targets ``[B]``, indices ``[B]`` and the key of every batch.

        Raises:
            DataError: more than ``max_broken`` files could not be read.
        """
        plan = epoch_plan(self.seed, epoch, self.samples, 1)
        steps = range(first_step, self.steps)
        self._tasks.now = [(plan.key, plan.order[self.part(step).rows].tolist()) for step in steps]
        keys = iter(range(plan.key + first_step, plan.key + self.steps))

        def place(made: Any) -> Tensors:
            return *self._place(made), torch.tensor(next(keys)).to(self.device, non_blocking=True)

        return ahead(self._loader, self.device, place)

    def _place(self, made: Made) -> Tensors:
        self._count(made.broken)
        return to_device(made[:3], self.device)

    def _count(self, broken: list[str]) -> None:
        for name in broken:
            if name not in self._broken:
                self._broken.add(name)
                self.warn(f"{name} cannot be read: another sample takes its place ({len(self._broken)} so far)")
        if len(self._broken) > self.max_broken:
            raise DataError(
                f"{len(self._broken)} training images cannot be read, the last is {broken[-1]}: --check-data lists all "
                "of them; repair them or raise DATASET.MAX_BROKEN"
            )

    def prepare(self, *raw: Tensor) -> Batch:
        """See :class:`TrainLoader`."""
        images, targets, indices, key = raw
        return Batch(normalise(images, self._mean, self._std), targets, indices, torch.full_like(indices, -1), key)


class ImageEvalLoader(EvalLoader):
    """The test split: shorter side resized, central crop, normalised."""

    def __init__(self, dataset: Images, batch_size: int, device: torch.device, share: Share = ALONE) -> None:
        self._samples, self.device = len(dataset.test.source), device
        mine = eval_share(self._samples, share)
        tasks = [(0, mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
        reader = EvalReader(dataset.test, dataset.options)
        self._loader = _loader(reader, _Tasks(tasks), device.type == "cuda")
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in ahead(self._loader, self.device, self._place):
            yield normalise(images, self._mean, self._std), targets

    def _place(self, made: Made) -> Tensors:
        if made.broken:
            raise DataError(f"the test image {made.broken[0]} cannot be read, and none may be left out: repair it")
        return to_device(made[:2], self.device)

    def __len__(self) -> int:
        return self._samples


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    """The same tensors there; the copy from pinned memory is not waited for."""
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def ahead(batches: DataLoader[Any], device: torch.device, place: Callable[[Any], Tensors]) -> Iterator[Tensors]:
    """The batches on the device; on CUDA the next one is put there on a stream of its own while this one is used.

    Args:
        batches: what workers made.
        device: where it is needed.
        place: puts a batch there.
    """
    if device.type != "cuda":
        yield from map(place, batches)
        return
    side = _side_stream(device)
    waiting: tuple[Tensors, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            placed = place(batch), side.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = placed
    if waiting is not None:
        yield _arrived(*waiting, device)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which batches are placed, in all epochs: memory that is freed stays with the stream it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _arrived(batch: Tensors, placed: torch.cuda.Event, device: torch.device) -> Tensors:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(placed)
    for tensor in batch:
        tensor.record_stream(stream)  # its memory is not given away while this stream uses it
    return batch
