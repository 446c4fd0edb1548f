"""How many images a second the loader of an image folder reads, beside the usual one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mdistiller_norm.data.class_tree import class_folders, scan
from mdistiller_norm.data.image_folder import MEAN, STD, ImageDataset
from mdistiller_norm.data.image_reader import ImageOptions


@dataclass(frozen=True)
class Throughput:
    """Images a second of the two ways to read a folder, in the same run.

    Attributes:
        ours: of :class:`ImageTrainLoader`, whose images are normalised on the device that trains: not counted here.
        usual: of torchvision's ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize on PIL images.
        images: read by each in a pass.
        workers: processes that each had.
    """

    ours: float
    usual: float
    images: int
    workers: int


def loader_throughput(folder: Path, options: ImageOptions, *, batch_size: int, passes: int) -> Throughput:
    """Measure this loader against the usual one on the class folders of ``folder``, the best of alternating passes.

    Args:
        folder: of class folders.
        options: how the images are read; as ImageNet's where it does not say how they are normalised.
        batch_size: of both.
        passes: over the images, of each, besides an untimed one.

    Raises:
        DataError: no class folders there.
    """
    classes = class_folders(folder)
    split = scan(folder, classes)
    options = replace(options, mean=options.mean or MEAN, std=options.std or STD)
    dataset = ImageDataset("throughput", tuple(classes), split, split, options)
    ours = dataset.train_loader(batch_size, 0, torch.device("cpu"))
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size, options.crop_scale),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(options.mean, options.std),
        ]
    )
    usual: Any = DataLoader(
        ImageFolder(str(folder), transform),
        batch_size,
        shuffle=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    best = [float("inf")] * 2
    for epoch in range(passes + 1):  # the first one starts the workers
        contestants = [(0, ours.batches(epoch + 1)), (1, usual)]
        for which, batches in contestants if epoch % 2 else reversed(contestants):
            start = time.perf_counter()
            for _ in batches:
                pass
            if epoch:
                best[which] = min(best[which], time.perf_counter() - start)
    images = len(split.source)
    return Throughput(images / best[0], images / best[1], images, options.workers)
