"""ImageNet, and any other tree of ``train/<class>/*`` and ``val/<class>/*``: images are read by worker processes.

A worker makes a whole batch: it decodes, crops and resizes into one uint8 tensor in shared memory. Normalisation is
part of the step, on the device. What happens to a sample is a function of (seed, epoch, its number), so it does not
matter how many workers and processes there are.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mdistiller_norm.data.augment import normalise
from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader, Warn
from mdistiller_norm.data.decode import decode, draw_view, eval_image, train_image
from mdistiller_norm.data.plan import ALONE, Share, epoch_plan, eval_share
from mdistiller_norm.errors import DataError
from mdistiller_norm.types import Batch

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# torchvision's constants, which its published weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
UNREADABLE = (OSError, ValueError, SyntaxError)  # what decoding a damaged file raises
INFERRED_FROM = 1000  # images that mean and standard deviation are measured on


@dataclass(frozen=True)
class ImageOptions:
    """How images of a folder are read.

    Attributes:
        size: height and width of what a network sees.
        resize: what the shorter side is resized to before the central crop of an evaluation.
        crop_scale: least and largest share of the area that a random crop keeps.
        mean: of the channels, of pixels in [0, 1]; empty for the data set's constants, or to measure it.
        std: likewise.
        classes: names of the class folders in the order of the class numbers; empty for all of them, sorted.
        variant: "cifar" or "imagenet" networks; "auto" takes the latter for images above 64 pixels.
        workers: processes that read images; 0 to read them in the process that trains.
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


class Source(Protocol):
    """The encoded images of a split."""

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int) -> bytes:
        """The bytes of one.

        Raises:
            OSError: it cannot be read.
        """

    def name(self, index: int) -> str:
        """What a person finds it by."""


class Files:
    """Image files under a folder. Their names are one array, which forked workers share without copying.

    Args:
        folder: that the names are relative to.
        names: of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._names = np.array([os.fsencode(name) for name in names], dtype=bytes)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        """See :class:`Source`."""
        with open(self.name(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        """The path."""
        return f"{self.folder}{os.sep}{os.fsdecode(bytes(self._names[index]))}"


class ImageSplit(NamedTuple):
    """A split: encoded images and their classes ``[N]`` int64."""

    source: Source
    targets: Tensor


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a split's folder, sorted.

    Raises:
        DataError: there is no such folder, or nothing in it.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): images belong in {folder}/<class>/") from error
    if not names:
        raise DataError(f"{folder} holds no class folders: images belong in {folder}/<class>/")
    return names


def scan(folder: Path, classes: Sequence[str]) -> ImageSplit:
    """The images of the class folders of a split, in the order of their names.

    Raises:
        DataError: a class has no images.
    """
    names: list[str] = []
    targets: list[int] = []
    for number, label in enumerate(classes):
        found = sorted(entry.name for entry in os.scandir(folder / label) if entry.name.lower().endswith(EXTENSIONS))
        if not found:
            raise DataError(f"{folder / label} holds no images ({', '.join(EXTENSIONS)}): complete it or remove it")
        names += [f"{label}{os.sep}{name}" for name in found]
        targets += [number] * len(found)
    return ImageSplit(Files(folder, names), torch.tensor(targets))


def same_classes(root: Path, found: dict[str, Sequence[str]], wanted: Sequence[str]) -> tuple[str, ...]:
    """The classes that all splits have.

    Args:
        root: of the data set.
        found: the class names of each split.
        wanted: those asked for; empty for all.

    Raises:
        DataError: a split lacks one.
    """
    classes = list(wanted) or sorted(set().union(*found.values()))
    for split, names in found.items():
        if missing := sorted(set(classes) - set(names)):
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(
                f"{root / split} has {len(names)} classes and lacks {len(missing)} ({some}) of the {len(classes)} "
                "wanted: train and val need the same class folders"
            )
    return tuple(classes)


def data_root(root: Path, name: str) -> Path:
    """``root``, or the folder ``name`` in it where only that has splits."""
    inside = [part for part in ("train", "val") if (root / name / part).is_dir()]
    return root / name if inside and not (root / "train").is_dir() and not (root / "val").is_dir() else root


def image_folder(root: Path, options: ImageOptions, name: str = "") -> ImageDataset:
    """A data set of image files, ``root/{train,val}/<class>/*``.

    Args:
        root: its folder, or the one that holds a folder ``name``.
        options: how it is read.
        name: of the data set; empty for its folder's.

    Raises:
        DataError: a split is missing or empty, or the splits have different classes.
    """
    root = data_root(root, name)
    splits = ["train", "val"] if options.train else ["val"]
    classes = same_classes(root, {split: class_folders(root / split) for split in splits}, options.classes)
    parts = [scan(root / split, classes) for split in splits]
    return ImageDataset(name or root.resolve().name, classes, parts[0], parts[-1], options)


def imagenet(root: Path, options: ImageOptions) -> ImageDataset:
    """ImageNet (ILSVRC 2012): ``root/{train,val}/<wnid>/*`` or ``root/imagenet/{train,val}/<wnid>/*``.

    Class numbers follow the sorted names of the folders, as in torchvision's weights.

    Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).

    Raises:
        DataError: see :func:`image_folder`.
    """
    if not any((data_root(root, "imagenet") / split).is_dir() for split in ("train", "val")):
        raise DataError(
            f"ImageNet is neither in {root}/{{train,val}}/<wnid>/ nor in {root}/imagenet/{{train,val}}/<wnid>/: "
            "fetch it from image-net.org by hand, and set DATASET.ROOT to its folder"
        )
    return image_folder(root, replace(options, mean=options.mean or MEAN, std=options.std or STD), "imagenet")


class ImageDataset(Dataset):
    """Encoded images, read by worker processes.

    Args:
        name: what checkpoints and results call it.
        classes: class names.
        train: the training split.
        test: the split that accuracy is measured on; the same object where there is no other.
        options: how it is read.

    Raises:
        DataError: mean and standard deviation are to be measured, and no image can be read.
    """

    def __init__(
        self, name: str, classes: tuple[str, ...], train: ImageSplit, test: ImageSplit, options: ImageOptions
    ) -> None:
        self.name, self.classes, self.train, self.test, self.options = name, classes, train, test, options
        if options.mean and options.std:
            self.mean, self.std = options.mean, options.std
        else:
            self.mean, self.std = measure(train.source, options)
        self.variant = options.variant
        if self.variant == "auto":
            self.variant = "imagenet" if options.size > 64 else "cifar"

    @property
    def image_size(self) -> tuple[int, int]:
        """See :class:`Dataset`."""
        return self.options.size, self.options.size

    @property
    def targets(self) -> Tensor:
        """See :class:`Dataset`."""
        return self.train.targets

    def summary(self) -> str:
        """See :class:`Dataset`."""
        return f"{self.name}: {len(self.classes)} classes, {len(self.train.source)} + {len(self.test.source)} images"

    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE, warn: Warn = print
    ) -> ImageTrainLoader:
        """See :class:`Dataset`."""
        return ImageTrainLoader(self, batch_size, seed, device, share, warn)

    def eval_loader(self, batch_size: int, device: torch.device, share: Share = ALONE) -> ImageEvalLoader:
        """See :class:`Dataset`."""
        return ImageEvalLoader(self, batch_size, device, share)

    def unreadable(self) -> list[str]:
        """See :class:`Dataset`."""
        splits = [self.train] if self.train is self.test else [self.train, self.test]
        found: list[str] = []
        for split in splits:
            tasks = [(0, range(first, min(first + 64, len(split.source)))) for first in range(0, len(split.source), 64)]
            for *_, broken in _loader(_Checks(split, self.options), tasks, self.options.workers, False):
                found += broken
        return found


def measure(source: Source, options: ImageOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels over evenly spaced images, rounded to four places.

    Raises:
        DataError: none of them can be read.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    for index in range(0, len(source), max(len(source) // INFERRED_FROM, 1)):
        try:
            image = eval_image(decode(source.read(index)), options.resize, options.size).flatten(1).double() / 255
        except UNREADABLE:
            continue
        sums += torch.stack([image.sum(1), image.square().sum(1)])
        pixels += image.shape[1]
    if not pixels:
        raise DataError(f"none of the images like {source.name(0)} can be read: set DATASET.ROOT to another folder")
    mean, square = sums / pixels
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in (square - mean**2).sqrt().tolist())


# What a worker is asked for: the key of the epoch and the numbers of the samples.
Task = tuple[int, Sequence[int]]
# What it gives: images [B, size, size, 3] uint8, targets [B], numbers of the samples [B], names of unreadable files.
Made = tuple[Tensor, Tensor, Tensor, list[str]]


class _Views(TorchDataset[Made]):
    """Training batches. A sample whose file is unreadable is replaced by another one, the same every time."""

    def __init__(self, split: ImageSplit, options: ImageOptions) -> None:
        self.split, self.options = split, options

    def __getitem__(self, task: Task) -> Made:
        key, wanted = task
        indices, broken = list(wanted), list[str]()
        images = _shared(len(indices), self.options.size)
        for row, index in enumerate(wanted):
            random = np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))
            for _ in range(self.options.max_broken + 1):
                image = _try_decode(self.split.source, indices[row], broken)
                if image is not None:
                    view = draw_view(random, image.shape[1], image.shape[2], self.options.crop_scale)
                    images[row] = train_image(image, view, self.options.size).permute(1, 2, 0)
                    break
                indices[row] = int(random.integers(len(self.split.source)))
        numbers = torch.tensor(indices)
        return images, self.split.targets[numbers], numbers, broken


class _Middles(_Views):
    """Evaluation batches."""

    def __getitem__(self, task: Task) -> Made:
        numbers, broken = torch.tensor(task[1]), list[str]()
        images = _shared(len(numbers), self.options.size)
        for row, index in enumerate(task[1]):
            image = _try_decode(self.split.source, index, broken)
            if image is not None:
                images[row] = eval_image(image, self.options.resize, self.options.size).permute(1, 2, 0)
        return images, self.split.targets[numbers], numbers, broken


class _Checks(_Views):
    """No images, only the names of the unreadable ones."""

    def __getitem__(self, task: Task) -> Made:
        broken: list[str] = []
        for index in task[1]:
            _try_decode(self.split.source, index, broken)
        return torch.empty(0), torch.empty(0), torch.empty(0), broken


def _try_decode(source: Source, index: int, broken: list[str]) -> Tensor | None:
    try:
        return decode(source.read(index))
    except UNREADABLE as error:
        broken.append(f"{source.name(index)} ({error})")
        return None


def _shared(count: int, size: int) -> Tensor:
    """Memory that the training process sees without another copy."""
    return torch.empty(count, size, size, 3, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call,no-any-return]


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


def _start_worker(number: int) -> None:
    """Leave Ctrl-C and the notice of a preemption to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _loader(reader: _Views, tasks: Any, workers: int, pin: bool) -> DataLoader[Made]:
    return DataLoader(
        reader,
        batch_size=None,  # a task is a batch
        sampler=tasks,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
        prefetch_factor=2 if workers else None,
    )


class ImageTrainLoader(TrainLoader):
    """Augmented training batches, one ahead on the device. The last, short batch of an epoch is kept."""

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: Share = ALONE,
        warn: Warn = print,
    ) -> None:
        super().__init__(len(dataset.train.source), batch_size, seed, share)
        self.device, self.warn, self.max_broken = device, warn, dataset.options.max_broken
        self._tasks = _Tasks()
        reader = _Views(dataset.train, dataset.options)
        self._loader = _loader(reader, self._tasks, dataset.options.workers, device.type == "cuda")
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)
        self._broken: set[str] = set()

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Images ``[B, size, size, 3]`` uint8, targets ``[B]``, indices ``[B]`` and the key of every batch.

        Raises:
            DataError: more than ``max_broken`` files could not be read.
        """
        plan = epoch_plan(self.seed, epoch, self.samples, 1)
        steps = range(first_step, self.steps)
        self._tasks.now = [(plan.key, plan.order[self.part(step).rows].tolist()) for step in steps]
        return ahead(self._with_keys(plan.key + first_step), self.device)

    def _with_keys(self, key: int) -> Iterator[tuple[Tensor, ...]]:
        for offset, (images, targets, indices, broken) in enumerate(self._loader):
            self._count(broken)
            yield images, targets, indices, torch.tensor(key + offset)

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

    def __init__(self, dataset: ImageDataset, batch_size: int, device: torch.device, share: Share = ALONE) -> None:
        self._samples, self.device = len(dataset.test.source), device
        mine = eval_share(self._samples, share)
        tasks = [(0, mine[first : first + batch_size]) for first in range(0, len(mine), batch_size)]
        reader = _Middles(dataset.test, dataset.options)
        self._loader = _loader(reader, _Tasks(tasks), dataset.options.workers, device.type == "cuda")
        self._mean, self._std = torch.tensor(dataset.mean, device=device), torch.tensor(dataset.std, device=device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in ahead(self._readable(), self.device):
            yield normalise(images, self._mean, self._std), targets

    def _readable(self) -> Iterator[tuple[Tensor, ...]]:
        for images, targets, _, broken in self._loader:
            if broken:
                raise DataError(f"the test image {broken[0]} cannot be read, and none may be left out: repair it")
            yield images, targets

    def __len__(self) -> int:
        return self._samples


def ahead(batches: Iterator[tuple[Tensor, ...]], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches on the device; on CUDA the next one is copied on a stream of its own while this one is used."""
    if device.type != "cuda":
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[tuple[Tensor, ...], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = tuple(tensor.to(device, non_blocking=True) for tensor in batch), side.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = copied
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: tuple[Tensor, ...], copied: torch.cuda.Event, device: torch.device) -> tuple[Tensor, ...]:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)  # its memory is not given away while this stream uses it
    return batch


@dataclass(frozen=True)
class Throughput:
    """Images a second of the two ways to read a folder, in the same run.

    Attributes:
        ours: of :class:`ImageTrainLoader`.
        usual: of torchvision's ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize on PIL images.
        images: read by each in a pass.
        workers: processes that each had.
    """

    ours: float
    usual: float
    images: int
    workers: int


def loader_throughput(
    folder: Path, *, size: int = 224, workers: int = 2, batch_size: int = 50, passes: int = 3
) -> Throughput:
    """Measure this loader against the usual one on the class folders of ``folder``, the best of alternating passes.

    Raises:
        DataError: no class folders there.
    """
    import time

    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    split = scan(folder, class_folders(folder))
    options = ImageOptions(size=size, mean=MEAN, std=STD, workers=workers)
    dataset = ImageDataset("throughput", tuple(class_folders(folder)), split, split, options)
    ours = dataset.train_loader(batch_size, 0, torch.device("cpu"))
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    usual: Any = DataLoader(
        ImageFolder(str(folder), transform),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    best = [float("inf")] * 2
    for epoch in range(passes + 1):  # the first one starts the workers
        for which, batches in enumerate((ours.batches(epoch + 1), usual)):
            start = time.perf_counter()
            for _ in batches:
                pass
            if epoch:
                best[which] = min(best[which], time.perf_counter() - start)
    images = len(split.source)
    return Throughput(images / best[0], images / best[1], images, workers)
