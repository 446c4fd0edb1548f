"""How many images a second the loader of an image folder reads, beside the usual one."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
        ours: of :class:`ImageTrainLoader`.
        usual: of torchvision's ImageFolder with RandomResizedCrop, flip, ToTensor and Normalize on PIL images.
        images: read by each in a pass.
        workers: processes that each had.
    """

    ours: float
    usual: float
    images: int
    workers: int


def loader_throughput(folder: Path, *, size: int, workers: int, batch_size: int, passes: int) -> Throughput:
    """Measure this loader against the usual one on the class folders of ``folder``, the best of alternating passes.

    Raises:
        DataError: no class folders there.
    """
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
