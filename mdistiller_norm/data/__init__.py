"""Data sets by name, and their loaders."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader
from mdistiller_norm.data.cifar import cifar10, cifar100
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.folder import image_folder, imagenet, tiny_imagenet
from mdistiller_norm.data.loader import ImageOptions
from mdistiller_norm.data.memory import MemoryTrainLoader, Split, TensorDataset
from mdistiller_norm.data.plan import Share
from mdistiller_norm.data.shards import webdataset
from mdistiller_norm.errors import ConfigError, DataError, first_line
from mdistiller_norm.registry import Registry

DATASETS: Registry[Callable[[Path, ImageOptions], Dataset]] = Registry("data set")
register = DATASETS.register  # decorator of a function for a DATASET.TYPE
DATASETS.update(
    cifar10=lambda root, options: cifar10(root), cifar100=lambda root, options: cifar100(root),
    digits=lambda root, options: digits(), imagenet=imagenet, image_folder=image_folder,
    tiny_imagenet=tiny_imagenet, webdataset=webdataset,
)  # fmt: skip


def open_dataset(name: str, root: Path, options: ImageOptions) -> Dataset:
    """Open a registered data set: ``DATASET.TYPE`` in ``DATASET.ROOT``."""
    if bool(options.mean) != bool(options.std):
        raise ConfigError("set both DATASET.MEAN and DATASET.STD, or neither")
    try:
        dataset: object = DATASETS[name](root, options)
    except OSError as error:  # a plugin's files
        raise DataError(f"data set {name!r} cannot be opened: {first_line(error)}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"data set {name!r} must be a TensorDataset, got {type(dataset)}")
    if isinstance(dataset, TensorDataset):
        if options.mean:
            dataset = replace(dataset, mean=options.mean, std=options.std)
        dataset.check()
    try:
        if options.val_split:
            dataset = dataset.hold_out(options.val_split)
        return dataset.subset(options.subset) if options.train and options.subset else dataset
    except (AttributeError, TypeError) as error:  # of a plugin's splits
        raise DataError(
            f"DATASET.VAL_SPLIT or SUBSET of {name!r}: {first_line(error)}"
        ) from error


__all__ = [
    "DATASETS", "Dataset", "EvalLoader", "ImageOptions", "MemoryTrainLoader", "Share", "Split",
    "TensorDataset", "TrainLoader", "cifar10", "cifar100", "digits", "image_folder", "imagenet", "open_dataset",
    "register", "tiny_imagenet", "webdataset",
]  # fmt: skip
