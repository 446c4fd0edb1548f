"""Data sets by name, and the loaders made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader
from mdistiller_norm.data.cifar import cifar100
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.image_folder import image_folder, imagenet
from mdistiller_norm.data.image_reader import ImageOptions
from mdistiller_norm.data.memory import MemoryEvalLoader, MemoryTrainLoader, Split, TensorDataset
from mdistiller_norm.data.plan import Share
from mdistiller_norm.data.webdataset import webdataset
from mdistiller_norm.registry import Registry


class Open(Protocol):
    """Opens a data set."""

    def __call__(self, root: Path, options: ImageOptions = ...) -> Dataset:
        """The data set under ``root``, checked; data sets in memory have no options."""


_DEFAULT = ImageOptions()

DATASETS: Registry[Open] = Registry("data set")
register = DATASETS.register  # decorator that files a function like Open under its DATASET.TYPE
DATASETS.register("cifar100")(lambda root, options=_DEFAULT: cifar100(root))
DATASETS.register("digits")(lambda root, options=_DEFAULT: digits())
DATASETS.register("imagenet")(lambda root, options=_DEFAULT: imagenet(root, options))
DATASETS.register("image_folder")(lambda root, options=_DEFAULT: image_folder(root, options))
DATASETS.register("webdataset")(lambda root, options=_DEFAULT: webdataset(root, options))

__all__ = [
    "DATASETS", "Dataset", "EvalLoader", "ImageOptions", "MemoryEvalLoader", "MemoryTrainLoader", "Share", "Split",
    "TensorDataset", "TrainLoader", "cifar100", "digits", "image_folder", "imagenet", "register", "webdataset",
]  # fmt: skip
