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
from mdistiller_norm.errors import DataError, first_line
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


def open_dataset(name: str, root: Path, options: ImageOptions) -> Dataset:
    """The data set of that name.

    Args:
        name: a ``DATASET.TYPE``.
        root: ``DATASET.ROOT``.
        options: the other ``DATASET`` keys.

    Raises:
        UserError: unknown name (lists the near ones); the data are missing or broken; not a data set.
    """
    try:
        dataset: object = DATASETS[name](root, options)
    except OSError as error:  # a plugin's own files
        raise DataError(f"data set {name!r} cannot be opened: {first_line(error)}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"data set {name!r} is opened as a {type(dataset).__name__}: return a TensorDataset")
    if isinstance(dataset, TensorDataset):
        dataset.check()
    return dataset


__all__ = [
    "DATASETS", "Dataset", "EvalLoader", "ImageOptions", "MemoryEvalLoader", "MemoryTrainLoader", "Share", "Split",
    "TensorDataset", "TrainLoader", "cifar100", "digits", "image_folder", "imagenet", "open_dataset", "register",
    "webdataset",
]  # fmt: skip
