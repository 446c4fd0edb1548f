"""Batches of encoded images, decoded by worker processes.

A worker builds a whole batch; normalisation is part of the step, on the device. The augmentation of a sample is a
function of (seed, epoch, index), so it does not depend on the number of workers and processes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Thread
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from mdistiller_norm.data.augment import normalise
from mdistiller_norm.data.base import EvalLoader, TrainLoader, Warn
from mdistiller_norm.data.decode import UNREADABLE, decode, draw_crop, eval_image, train_image, transforms
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import DataError
from mdistiller_norm.types import Batch

Task = tuple[int | None, Sequence[int]]  # key of the epoch, None for evaluation; indices of a batch
Tensors = tuple[Tensor, ...]
GROUP = 8  # images that are decoded, then resized: 6% faster than one at a time, as the code stays in the CPU's cache


class Source(Protocol):
    """The encoded images of a split."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file, or raise an OSError."""

    def name(self, index: int) -> str:
        """Name of an image for messages."""


class ImageSplit(NamedTuple):
    """Encoded images and their classes ``[N]`` int64."""

    source: Source
    targets: Tensor


@dataclass(frozen=True)
class ImageOptions:
    """How the images of a folder are read.

    Attributes:
        size: height and width of a network's input.
        resize: length of the shorter side before the centre crop of a test image.
        crop_scale: smallest and largest fraction of the area that a random crop keeps.
        mean: mean of each channel, of pixels in [0, 1]; empty to use the data set's constants or to measure it.
        std: standard deviation of each channel; likewise.
        classes: names of the class folders in the order of the class numbers; empty for all of them, sorted.
        variant: "cifar" or "imagenet" networks; "auto" chooses the latter for images above 64 pixels.
        workers: processes that read images; 0 to read them in the training process.
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


class ImageBatch(NamedTuple):
    """A decoded batch, and the name of each unreadable file with the reason."""

    images: Tensor  # [B, size, size, 3] uint8
    targets: Tensor  # [B] int64
    indices: Tensor  # [B] int64
    broken: list[str]


class Reader(TorchDataset[ImageBatch]):
    """Decodes batches of a split: random crops for a task with a key, otherwise centre crops.

    An unreadable training file is replaced by another sample, the same one every time.
    """

    def __init__(self, split: ImageSplit, options: ImageOptions) -> None:
        self.split, self.options = split, options

    def __getitem__(self, task: Task) -> ImageBatch:
        key, indices = task
        size, broken = self.options.size, list[str]()
        images = torch.zeros(len(indices), size, size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # type: ignore[no-untyped-call]  # saves a copy
        taken = torch.tensor(indices)
        for first in range(0, len(indices), GROUP):
            group = [self._read(key, index, broken) for index in indices[first : first + GROUP]]
            for row, (index, image, random) in enumerate(group, first):
                taken[row] = index
                if image is None:
                    continue
                if key is None:
                    view = eval_image(image, self.options.resize, size)
                else:
                    crop = draw_crop(random, image.shape[1], image.shape[2], self.options.crop_scale)
                    view = train_image(image, crop, size)
                images[row] = view.permute(1, 2, 0)
        return ImageBatch(images, self.split.targets[taken], taken, broken)

    def _read(
        self, key: int | None, index: int, broken: list[str]
    ) -> tuple[int, Tensor | None, np.random.Generator]:
        random = np.random.Generator(np.random.Philox(key=np.array([key or 0, index], dtype=np.uint64)))
        for _ in range(1 if key is None else self.options.max_broken + 1):
            try:
                return index, decode(self.split.source.read(index)), random
            except UNREADABLE as error:
                broken.append(f"{self.split.source.name(index)} ({error})")
            index = int(random.integers(len(self.split.source)))
        return index, None, random


def _start_worker(number: int, trainer: int) -> None:
    """Ignore signals to the process group: the training process handles them, and needs its workers to finish.

    Workers end with the loader, with the training process, or by a SIGTERM that the training process sends.
    """
    sys.excepthook = lambda *error: None  # multiprocessing would print that the training process has ended
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown: SIGTERM ends workers at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_exit_on_sigterm, args=(trainer,), daemon=True).start()


def _exit_on_sigterm(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _loader(
    split: ImageSplit,
    options: ImageOptions,
    tasks: list[Task],
    pin: bool,
    generator: torch.Generator | None = None,
) -> DataLoader[ImageBatch]:
    transforms()  # import it before forking, so that workers share it
    return DataLoader(
        Reader(split, options), batch_size=None, sampler=tasks, num_workers=options.workers, pin_memory=pin,
        worker_init_fn=partial(_start_worker, trainer=os.getpid()), persistent_workers=options.workers > 0,
        prefetch_factor=2 if options.workers else None, generator=generator,
    )  # fmt: skip


def _eval_tasks(rows: range, batch_size: int) -> list[Task]:
    return [(None, rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def unreadable(split: ImageSplit, options: ImageOptions, share: Share = ALONE) -> list[str]:
    """Read the files of a split; return the name of each unreadable one and the reason."""
    tasks = _eval_tasks(eval_share(len(split.source), share), 64)
    loader = _loader(
        split, options, tasks, pin=False, generator=torch.Generator()
    )  # leaves the global one as it is
    return [name for batch in _received(loader) for name in batch.broken]


class ImageTrainLoader(TrainLoader):
    """Augmented training batches of encoded images. The last, short batch of an epoch is kept."""

    def __init__(
        self, split: ImageSplit, options: ImageOptions, batch_size: int, seed: int, device: torch.device,
        share: Share = ALONE, warn: Warn = print,
    ) -> None:  # fmt: skip
        super().__init__(len(split.source), batch_size, seed, share)
        self.device, self._warn, self._max_broken = device, warn, options.max_broken
        self._tasks: list[Task] = []
        self._loader = _loader(split, options, self._tasks, pin=device.type == "cuda")
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (options.mean, options.std)
        )
        self._broken: set[str] = set()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        """Yield images ``[B, size, size, 3]`` uint8, targets ``[B]``, indices ``[B]`` and the key of each batch."""
        plan = epoch_plan(self.seed, epoch, self.samples, 1)
        steps = range(first_step, self.steps)
        self._tasks[:] = [(plan.key, plan.order[self.part(step).rows].tolist()) for step in steps]
        for batch, step in zip(prefetch(self._loader, self._check, self.device), steps, strict=True):
            yield *batch, torch.full((), plan.key + step, device=self.device)

    def _check(self, broken: list[str]) -> None:
        for name in broken:
            if name not in self._broken:
                self._broken.add(name)
                self._warn(
                    f"{name} cannot be read: another sample takes its place ({len(self._broken)} so far)"
                )
        if len(self._broken) > self._max_broken:
            raise DataError(
                f"{len(self._broken)} training images cannot be read, the last is {broken[-1]}: list them with "
                "--check-data, and repair them or raise DATASET.MAX_BROKEN"
            )

    def prepare(self, *raw: Tensor) -> Batch:
        images, targets, indices, key = raw
        return Batch(
            normalise(images, self._mean, self._std), targets, indices, torch.full_like(indices, -1), key
        )


class ImageEvalLoader(EvalLoader):
    """Test images: shorter side resized, centre crop, normalised."""

    def __init__(
        self,
        split: ImageSplit,
        options: ImageOptions,
        batch_size: int,
        device: torch.device,
        share: Share = ALONE,
    ) -> None:
        self._samples, self.device = len(split.source), device
        tasks = _eval_tasks(eval_share(self._samples, share), batch_size)
        self._loader = _loader(split, options, tasks, pin=device.type == "cuda")
        self._mean, self._std = (
            torch.tensor(values, device=device) for values in (options.mean, options.std)
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, _ in prefetch(self._loader, _refuse, self.device):
            yield normalise(images, self._mean, self._std), targets

    def __len__(self) -> int:
        return self._samples


def _refuse(broken: list[str]) -> None:
    if broken:
        raise DataError(f"the test image {broken[0]} cannot be read: repair or remove it")


def _received(batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
    try:
        yield from batches
    except RuntimeError as error:
        if "</torch_" not in str(error):  # a file of shared memory
            raise
        raise DataError(
            "the shared memory (/dev/shm) is too small for the batches of the workers: enlarge it (docker run "
            "--shm-size 8g), or lower SOLVER.BATCH_SIZE or DATASET.NUM_WORKERS; 0 workers need none"
        ) from error


def prefetch(
    batches: Iterable[ImageBatch], check: Callable[[list[str]], None], device: torch.device
) -> Iterator[Tensors]:
    """Copy batches to a device; on CUDA, copy the next batch on a side stream while the current one is used."""
    waiting = list[tuple[Tensors, torch.cuda.Event]]()
    for batch in _received(batches):
        check(batch.broken)
        if device.type != "cuda":
            yield tuple(tensor.to(device) for tensor in batch[:3])
            continue
        side = _side_stream(device)
        with torch.cuda.stream(side):
            copied = tuple(tensor.to(device, non_blocking=True) for tensor in batch[:3])
        waiting.append((copied, side.record_event()))
        if len(waiting) > 1:
            yield _wait(*waiting.pop(0))
    for last in waiting:
        yield _wait(*last)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all epochs: freed memory can only be reused on the stream that it was used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _wait(batch: Tensors, copied: torch.cuda.Event) -> Tensors:
    stream = torch.cuda.current_stream(batch[0].device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)  # keep its memory until this stream has used it
    return batch
