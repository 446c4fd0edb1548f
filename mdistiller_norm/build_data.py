"""Build the data of a run from its config."""

from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.config import method_names
from mdistiller_norm.data import DATASETS, Dataset, ImageOptions, Share, TensorDataset, open_dataset
from mdistiller_norm.data.base import TrainLoader, Warn
from mdistiller_norm.data.mix import MixedLoader
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import suggest


def image_options(cfg: Any) -> ImageOptions:
    """Return the options for reading image files."""
    data = cfg.DATASET
    return ImageOptions(
        size=data.IMAGE_SIZE, resize=data.RESIZE, crop_scale=tuple(data.CROP_SCALE), mean=tuple(data.MEAN),
        std=tuple(data.STD), classes=tuple(data.CLASSES), variant=data.VARIANT, workers=data.NUM_WORKERS,
        max_broken=data.MAX_BROKEN, val_split=data.VAL_SPLIT, subset=data.SUBSET, randaugment=data.RANDAUGMENT,
    )  # fmt: skip


def build_dataset(cfg: Any) -> Dataset:
    """Open the data set."""
    data, options = cfg.DATASET, image_options(cfg)
    if data.TYPE not in DATASETS:
        raise ConfigError(f"DATASET.TYPE: unknown data set {data.TYPE!r}: {suggest(data.TYPE, DATASETS)}")
    return open_dataset(data.TYPE, Path(data.ROOT), options)


def check_augmentation(cfg: Any, dataset: Dataset) -> None:
    """Check that the methods, the data set and the teacher cache support the augmentation."""
    mixing = [f"DATASET.{key}" for key in ("MIXUP", "CUTMIX") if cfg.DATASET[key]]
    used = mixing + ["DATASET.RANDAUGMENT"] * bool(cfg.DATASET.RANDAUGMENT)
    hard = [name for name in method_names(cfg) if DISTILLERS[name].needs_labels]
    if mixing and hard:
        raise ConfigError(
            f"{' and '.join(mixing)} cannot be used with {', '.join(hard)}: an image needs one class"
        )
    if used and cfg.DISTILLER.TEACHER_CACHE != "off":
        raise ConfigError(f"{' and '.join(used)} cannot be used with DISTILLER.TEACHER_CACHE")
    if cfg.DATASET.RANDAUGMENT and isinstance(dataset, TensorDataset):
        raise ConfigError(f"DATASET.RANDAUGMENT requires image files, {dataset.name} is in memory")


def build_loader(cfg: Any, dataset: Dataset, device: torch.device, share: Share, warn: Warn) -> TrainLoader:
    """Return the loader of the training batches."""
    data = cfg.DATASET
    loader = dataset.train_loader(cfg.SOLVER.BATCH_SIZE, cfg.SEED, device, share, warn)
    if data.MIXUP or data.CUTMIX:
        return MixedLoader(loader, data.MIXUP, data.CUTMIX, len(dataset.classes), device)
    return loader
