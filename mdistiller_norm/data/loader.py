"""Batches of encoded images, decoded by worker processes.

The augmentation of a sample is a function of (seed, epoch, index), whatever the number of workers and processes.
"""

import copy
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from mdistiller_norm.data.augment import Normalise
from mdistiller_norm.data.base import EvalLoader, Tensors, TrainLoader
from mdistiller_norm.data.decode import UNREADABLE, decode, draw_crop, eval_image, train_image
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import DataError
from mdistiller_norm.types import Batch

Task = tuple[int | None, Sequence[int]]  # key of the epoch or None; indices of a batch
# Images [B, size, size, 3] uint8, targets [B], indices [B], and the unreadable files.
Decoded = tuple[Tensor, Tensor, Tensor, list[str]]
GROUP = 8  # images that are decoded, then resized: 6% faster than one by one


class ImageSplit(ABC):
    """Encoded images and their classes.

    Args:
        folder: folder of the files.
        entries: ``[N, ...]``, the place of each image. An array: forked workers share it without copying.
        targets: ``[N]`` int64.
    """

    def __init__(self, folder: Path, entries: NDArray[Any], targets: Tensor) -> None:
        self.folder, self.entries, self.targets = folder, entries, targets

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, rows: Tensor) -> Self:
        part = copy.copy(self)
        part.entries, part.targets = self.entries[rows.numpy()], self.targets[rows]
        return part

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the bytes of an image file, or raise an OSError."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image for messages."""


@dataclass(frozen=True)
class ImageOptions:
    """How the images of a folder are read.

    Attributes:
        size: height and width of a network's input.
        resize: length of the shorter side before the centre crop of a test image.
        crop_scale: smallest and largest fraction of the area that a random crop keeps.
        mean: mean of each channel, of pixels in [0, 1]; empty for the data set's constants, else measured.
        std: standard deviation of each channel; likewise.
        classes: names of the class folders in the order of the class numbers; empty for all of them, sorted.
        variant: "cifar" or "imagenet" networks; "auto" chooses the latter for images above 64 pixels.
        workers: processes that read images; 0 to read them in the training process.
        max_broken: unreadable training files that are replaced by other samples before the run fails.
        train: whether the training split is needed.
        val_split: share of the training images to evaluate on instead of the test split.
        subset: number of training images, equally many of each class; 0 for all.
        rotation: largest angle of a random rotation of training images, in degrees.
        randaugment: magnitude of RandAugment (Cubuk et al., 2020) on training images, of 30; 0 for none.
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
    val_split: float = 0.0
    subset: int = 0
    rotation: float = 0.0
    randaugment: int = 0


class Reader(TorchDataset[Decoded]):
    """Decodes batches of a split: random crops for a task with a key, otherwise centre crops.

    An unreadable training file is replaced by another sample, the same one every time.
    """

    def __init__(self, split: ImageSplit, options: ImageOptions) -> None:
        from torchvision.transforms import v2  # imported before forking

        self.split, self.options = split, options
        self._transforms: list[Callable[[Tensor], Tensor]] = []
        if options.rotation:
            self._transforms.append(v2.RandomRotation(options.rotation))
        if options.randaugment:
            self._transforms.append(v2.RandAugment(magnitude=options.randaugment))

    def __getitem__(self, task: Task) -> Decoded:
        key, indices = task
        size, broken = self.options.size, list[str]()
        images = torch.zeros(len(indices), size, size, 3, dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # saves a copy
        taken = torch.tensor(indices)
        for first in range(0, len(indices), GROUP):
            group = [self._read(key, index, broken) for index in indices[first : first + GROUP]]
            for row, (index, image, random) in enumerate(group, first):
                taken[row] = index
                images[row] = self._view(image, None if key is None else random).permute(1, 2, 0)
        return images, self.split.targets[taken], taken, broken

    def _read(
        self, key: int | None, index: int, broken: list[str]
    ) -> tuple[int, Tensor, np.random.Generator]:
        random = np.random.Generator(np.random.Philox(key=np.array([key or 0, index], np.uint64)))
        for _ in range(1 if key is None else self.options.max_broken + 1):
            try:
                return index, decode(self.split.read(index)), random
            except UNREADABLE as error:
                broken.append(f"{self.split.name(index)} ({error})")
            index = int(random.integers(len(self.split)))
        return index, torch.zeros(3, 1, 1, dtype=torch.uint8), random

    def _view(self, image: Tensor, random: np.random.Generator | None) -> Tensor:
        if random is None:
            return eval_image(image, self.options.resize, self.options.size)
        crop = draw_crop(random, image.shape[1], image.shape[2], self.options.crop_scale)
        view = train_image(image, crop, self.options.size)
        with torch.random.fork_rng([], enabled=bool(self._transforms)):
            for transform in self._transforms:
                torch.default_generator.manual_seed(int(random.integers(2**63)))
                view = transform(view)
        return view


def _start_worker(number: int, trainer: int) -> None:
    # The training process handles signals to the group and needs its workers to finish: only its SIGTERM ends them.
    # A worker prints no traceback when the training process has ended.
    sys.excepthook = lambda *error: None
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_exit_on_sigterm, args=(trainer,), daemon=True).start()


def _exit_on_sigterm(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


class _Loader:
    # Decoded batches of a list of tasks, which may change between two iterations, copied to a device.
    # The unreadable files are the last item of each batch.
    def __init__(self, reader: Reader, tasks: list[Task], device: torch.device) -> None:
        self.device, self._tasks = device, tasks
        self._batches = DataLoader(
            reader,
            batch_size=None,
            sampler=tasks,
            num_workers=reader.options.workers,
            multiprocessing_context="fork" if reader.options.workers else None,
            worker_init_fn=partial(_start_worker, trainer=os.getpid()),
            persistent_workers=bool(reader.options.workers),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # leaves the global one as it is
        )

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Any]:
        try:
            for *batch, broken in self._batches:
                yield *(tensor.to(self.device, non_blocking=True) for tensor in batch), broken
        except RuntimeError as error:
            if "</torch_" not in str(error):  # a file of shared memory
                raise
            raise DataError(
                "/dev/shm is too small: set DATASET.NUM_WORKERS 0, or use docker run --shm-size 8g"
            ) from error


def _eval_tasks(samples: int, batch_size: int, share: Share) -> list[Task]:
    rows = eval_share(samples, share)
    return [(None, rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]


def unreadable(split: ImageSplit, options: ImageOptions, share: Share = ALONE) -> list[str]:
    """Read the files of a split; return the name of each unreadable one and the reason."""
    tasks = _eval_tasks(len(split), 64, share)
    batches = _Loader(Reader(split, options), tasks, torch.device("cpu"))
    return [name for *_, broken in batches for name in broken]


class ImageTrainLoader(TrainLoader):
    """Augmented training batches of encoded images. The last, short batch of an epoch is kept."""

    def __init__(
        self,
        split: ImageSplit,
        options: ImageOptions,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: Share = ALONE,
    ) -> None:
        super().__init__(len(split), batch_size, seed, share)
        self._max_broken, self._broken = options.max_broken, set[str]()
        self._tasks: list[Task] = []
        self._loader = _Loader(Reader(split, options), self._tasks, device)
        self._normalise = Normalise(options.mean, options.std, device)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Tensors]:
        order, _, key = epoch_plan(self.seed, epoch, self.samples, 1)
        steps = range(first_step, self.steps)
        self._tasks[:] = [(key, order[self.part(step).rows].tolist()) for step in steps]
        for (*batch, broken), step in zip(self._loader, steps, strict=True):
            for name in sorted({*broken} - self._broken):
                self._broken.add(name)
                self.warn(f"{name} cannot be read: another sample takes its place")
            if len(self._broken) > self._max_broken:
                raise DataError(
                    f"{len(self._broken)} unreadable images: see --check-data, or raise DATASET.MAX_BROKEN"
                )
            yield *batch, torch.full((), key + step, device=self._loader.device)

    def prepare(self, *raw: Tensor) -> Batch:
        images, targets, indices, key = raw
        return Batch(self._normalise(images), targets, indices, torch.full_like(indices, -1), key)


def eval_loader(
    split: ImageSplit, options: ImageOptions, batch_size: int, device: torch.device, share: Share
) -> EvalLoader:
    """Return the loader of test images: shorter side resized, centre crop, normalised."""
    tasks = _eval_tasks(len(split), batch_size, share)
    batches = _TestImages(Reader(split, options), tasks, device)
    return EvalLoader(batches, Normalise(options.mean, options.std, device))


class _TestImages(_Loader):
    def __iter__(self) -> Iterator[Any]:
        for *batch, broken in super().__iter__():
            if broken:
                raise DataError(f"the test image {broken[0]} cannot be read: repair or remove it")
            yield batch
