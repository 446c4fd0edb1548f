"""ImageNet and other data sets of image files, ``train/<class>/*`` and ``val/<class>/*``."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mdistiller_norm.data.base import Dataset, EvalLoader
from mdistiller_norm.data.decode import UNREADABLE, decode, eval_image
from mdistiller_norm.data.loader import (
    ImageOptions,
    ImageSplit,
    ImageTrainLoader,
    eval_loader,
    unreadable,
)
from mdistiller_norm.data.plan import ALONE, Share
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import regular

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# torchvision's constants, with which its published weights were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MEASURED = 1000  # images


class Files(ImageSplit):
    """Image files; ``entries`` are their names in the folder, as bytes."""

    def read(self, index: int) -> bytes:
        return regular(Path(self._path(index))).read_bytes()

    def name(self, index: int) -> str:
        return _printable(self._path(index))

    def _path(self, index: int) -> str:
        return f"{self.folder}/{os.fsdecode(bytes(self.entries[index]))}"


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def list_images(folder: Path, classes: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the sorted names of the images of each class folder of a split: of these classes, or of all."""
    hint = f"images belong in {folder}/<class>/; without val, set DATASET.VAL_SPLIT"
    try:
        folders = filter(Path.is_dir, folder.iterdir())
        labels = sorted(path.name for path in folders if path.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): {hint}") from error
    if not labels:
        raise DataError(f"{folder} has no class folders: {hint}")
    if wrong := [_printable(label) for label in labels if _printable(label) != label]:
        raise DataError(f"the class folder {wrong[0]} in {folder} has a name that is not UTF-8")
    if labels == ["images"]:  # Tiny-ImageNet as it is distributed
        images = defaultdict(list)
        try:
            for line in regular(folder / "val_annotations.txt").read_text().splitlines():
                image, label, *_ = line.split("\t")
                images[label].append(f"images/{image}")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} has no class folders or val_annotations.txt") from error
        return images
    labels = [label for label in labels if label in (classes or labels)]
    return {label: sorted(image_names(f"{folder}/{label}", f"{label}/")) for label in labels}


def image_names(folder: str, prefix: str, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the image files in a folder and in the folders below it, links included, with a prefix."""
    real = os.path.realpath(folder)  # links may lead to a parent
    for entry in os.scandir(folder) if real not in parents else ():
        if entry.is_dir():
            yield from image_names(entry.path, f"{prefix}{entry.name}/", (*parents, real))
        elif entry.name.lower().endswith(EXTENSIONS):
            yield prefix + entry.name


def files(folder: Path, images: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Files:
    """Return the images of a split as numbered classes; hidden files and files in hidden folders are left out."""
    names: list[bytes] = []
    targets: list[int] = []
    for number, label in enumerate(classes):
        found = [os.fsencode(name) for name in images.get(label, ()) if "/." not in name]
        if not found:
            raise DataError(f"{folder} has no images ({', '.join(EXTENSIONS)}) of class {label}")
        names += found
        targets += [number] * len(found)
    return Files(folder, np.array(names), torch.tensor(targets))


def data_root(root: Path, name: str) -> Path:
    """Return ``root``, or its folder ``name`` if only that one contains splits."""
    splits = [path / split for path in (root, root / name) for split in ("train", "val")]
    return next((split.parent for split in splits if split.is_dir()), root)


def split_names(options: ImageOptions) -> tuple[str, ...]:
    """Return the splits to open, the last of them for evaluation, which may be held out of ``train``."""
    return ("train",) if options.val_split else ("train", "val") if options.train else ("val",)


def image_folder(root: Path, options: ImageOptions, name: str = "") -> ImageDataset:
    """Open a data set of image files, ``root/{train,val}/<class>/*`` or in the folder ``name`` of ``root``."""
    root = data_root(root, name)
    found = {each: list_images(root / each, options.classes) for each in split_names(options)}
    classes = options.classes or tuple(sorted(set().union(*found.values())))
    parts = [files(root / split, images, classes) for split, images in found.items()]
    dataset = ImageDataset(name or root.resolve().name, classes, parts, options)
    listed = sum(len(images[label]) for images in found.values() for label in classes)
    dataset.hidden = listed - sum(map(len, parts))
    return dataset


def imagenet(root: Path, options: ImageOptions) -> ImageDataset:
    """Open ImageNet (ILSVRC 2012): ``root/{train,val}/<wnid>/*`` or ``root/imagenet/{train,val}/<wnid>/*``.

    Class numbers follow the sorted names of the folders, as in torchvision's weights.
    Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge" (2015).
    """
    options = replace(options, mean=options.mean or MEAN, std=options.std or STD)
    return image_folder(root, options, "imagenet")


def tiny_imagenet(root: Path, options: ImageOptions) -> ImageDataset:
    """Open Tiny-ImageNet, 64x64 pixels: ``root`` or ``root/tiny-imagenet-200``, as downloaded or with class folders.

    Training images are rotated by up to 20 degrees and mirrored, not cropped, as in mdistiller.
    """
    options = replace(
        options,
        size=64,
        resize=64,
        crop_scale=(1.0, 1.0),
        rotation=20,
        mean=options.mean or (0.4802, 0.4481, 0.3975),
        std=options.std or (0.2302, 0.2265, 0.2262),
    )
    return image_folder(data_root(root, "tiny-imagenet-200"), options, "tiny_imagenet")


class ImageDataset(Dataset):
    """Encoded images, read by worker processes. Mean and standard deviation are measured if they are not given."""

    train: ImageSplit
    test: ImageSplit

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        splits: Sequence[ImageSplit],
        options: ImageOptions,
    ) -> None:
        resize, size = options.resize, options.size
        if resize < size:
            raise ConfigError(
                f"DATASET.RESIZE must be >= DATASET.IMAGE_SIZE {size}, got {resize}"
            )
        self.name, self.classes, self.train, self.test = name, classes, splits[0], splits[-1]
        given = options.mean, options.std
        self.mean, self.std = given if options.mean else measure(self.train, options)
        self.options = replace(options, mean=self.mean, std=self.std)
        self.variant = options.variant.replace("auto", "imagenet" if size > 64 else "cifar")

    @property
    def image_size(self) -> tuple[int, int]:
        return self.options.size, self.options.size

    def metadata(self) -> dict[str, object]:
        return super().metadata() | {"resize": self.options.resize}

    def fingerprint(self) -> str:
        sizes = []
        for index in range(0, len(self.train), max(len(self.train) // 200, 1)):
            with contextlib.suppress(OSError):
                sizes.append(len(self.train.read(index)))
        return hashlib.sha256(f"{super().fingerprint()} {sizes}".encode()).hexdigest()

    def train_loader(
        self, batch_size: int, seed: int, device: torch.device, share: Share = ALONE
    ) -> ImageTrainLoader:
        return ImageTrainLoader(self.train, self.options, batch_size, seed, device, share)

    def eval_loader(
        self, batch_size: int, device: torch.device, share: Share = ALONE
    ) -> EvalLoader:
        return eval_loader(self.test, self.options, batch_size, device, share)

    def unreadable(self, train: bool = True, share: Share = ALONE) -> list[str]:
        splits = dict.fromkeys((self.train, self.test) if train else (self.test,))
        return [name for split in splits for name in unreadable(split, self.options, share)]


def measure(split: ImageSplit, options: ImageOptions) -> Sequence[tuple[float, ...]]:
    """Measure mean and standard deviation of each channel on evenly spaced images, rounded to four digits.

    The deviation of a constant channel is set to 1, so that its normalised value is 0.
    """
    sums = torch.zeros(2, 3, dtype=torch.float64)
    pixels = 0
    for index in range(0, len(split), max(len(split) // MEASURED, 1)):
        with contextlib.suppress(*UNREADABLE):
            image = eval_image(decode(split.read(index)), options.resize, options.size)
            values = image.flatten(1).double() / 255
            sums += torch.stack([values.sum(1), values.square().sum(1)])
            pixels += values.shape[1]
    if not pixels:
        raise DataError(f"none of the images such as {split.name(0)} can be read")
    mean, square = sums / pixels
    std = (square - mean**2).clamp_min(0).sqrt().tolist()
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) or 1.0 for x in std)
