"""ImageNet, and any other tree of ``train/<class>/*`` and ``val/<class>/*``, as a data set."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mdistiller_norm.data.base import Dataset, Warn
from mdistiller_norm.data.class_tree import ImageSplit, Source, class_folders, data_root, same_classes, scan
from mdistiller_norm.data.decode import UNREADABLE, decode, eval_image
from mdistiller_norm.data.image_loader import ImageEvalLoader, ImageTrainLoader, unreadable
from mdistiller_norm.data.image_reader import ImageOptions
from mdistiller_norm.data.plan import ALONE, Share
from mdistiller_norm.errors import ConfigError, DataError

# torchvision's constants, which its published weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
__all__ = ["MEAN", "STD", "ImageDataset", "ImageOptions", "data_root", "image_folder", "imagenet", "measure"]

INFERRED_FROM = 1000  # images that mean and standard deviation are measured on


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
        ConfigError: test images are made smaller than what a network sees; or one of mean and standard deviation is
            given, and the other is not.
    """

    def __init__(
        self, name: str, classes: tuple[str, ...], train: ImageSplit, test: ImageSplit, options: ImageOptions
    ) -> None:
        if options.resize < options.size:
            raise ConfigError(
                f"DATASET.RESIZE {options.resize} is less than DATASET.IMAGE_SIZE {options.size}: test images would "
                "have black margins; raise it"
            )
        if bool(options.mean) != bool(options.std):
            raise ConfigError("DATASET.MEAN and DATASET.STD are measured together on images: set both, or neither")
        self.name, self.classes, self.train, self.test, self.options = name, classes, train, test, options
        self.mean, self.std = (options.mean, options.std) if options.mean else measure(train.source, options)
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

    def fingerprint(self) -> str:
        """See :class:`Dataset`: with the sizes of a few hundred images."""
        sizes = []
        for index in range(0, len(self.train.source), max(len(self.train.source) // 200, 1)):
            with contextlib.suppress(*UNREADABLE):
                sizes.append(len(self.train.source.read(index)))
        return hashlib.sha256(f"{super().fingerprint()} {sizes}".encode()).hexdigest()

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
        return [name for split in splits for name in unreadable(split, self.options)]


def measure(source: Source, options: ImageOptions) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels over evenly spaced images, rounded to four places.

    A channel that is the same everywhere has the deviation 1: it is 0 once normalised.

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
    std = (square - mean**2).clamp_min(0).sqrt()
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) or 1.0 for x in std.tolist())
