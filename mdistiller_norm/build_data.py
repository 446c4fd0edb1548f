"""Build the data of a run from its config."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.data import DATASETS, Dataset, ImageOptions, Share, TensorDataset, open_dataset
from mdistiller_norm.data.base import TrainLoader, Warn
from mdistiller_norm.data.mix import MixedLoader
from mdistiller_norm.data.plan import smallest_micro_batch
from mdistiller_norm.distillers import Distiller
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.models import Network
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


def check_augmentation(cfg: Any, dataset: Dataset, distillers: Mapping[str, Distiller]) -> None:
    """Check that the methods, the data set and the teacher cache support the augmentation."""
    mixing = [f"DATASET.{key}" for key in ("MIXUP", "CUTMIX") if cfg.DATASET[key]]
    used = mixing + ["DATASET.RANDAUGMENT"] * bool(cfg.DATASET.RANDAUGMENT)
    hard = [name for name, method in distillers.items() if method.needs_labels]
    if mixing and hard:
        raise ConfigError(
            f"{' and '.join(mixing)} cannot be used with {', '.join(hard)}: an image needs one class"
        )
    if used and cfg.DISTILLER.TEACHER_CACHE != "off":
        raise ConfigError(f"{' and '.join(used)} cannot be used with DISTILLER.TEACHER_CACHE")
    if cfg.DATASET.RANDAUGMENT and isinstance(dataset, TensorDataset):
        raise ConfigError(f"DATASET.RANDAUGMENT requires image files, {dataset.name} is in memory")


def check_data(cfg: Any, student: Network, dataset: Dataset, share: Share, check_test: bool) -> None:
    """Check the test images (if no teacher is evaluated on them), and the student if a micro-batch has one image."""
    solver, samples = cfg.SOLVER, len(dataset.targets)
    if check_test and (broken := dataset.unreadable(train=False, share=share)):
        raise DataError(f"the test image {broken[0]} cannot be read: repair or remove it")
    if smallest_micro_batch(samples, solver.BATCH_SIZE, share, solver.ACCUMULATE) > 1:
        return
    shadow = copy.deepcopy(student).to("meta").train()
    try:
        with torch.no_grad():
            shadow(torch.empty(1, 3, *dataset.image_size, device="meta"))
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} leaves one of the {samples} images for a micro-batch, too few for "
            f"a batch norm of {student.name}"
        ) from error


def build_loader(cfg: Any, dataset: Dataset, device: torch.device, share: Share, warn: Warn) -> TrainLoader:
    """Return the loader of the training batches."""
    data = cfg.DATASET
    loader = dataset.train_loader(cfg.SOLVER.BATCH_SIZE, cfg.SEED, device, share, warn)
    if data.MIXUP or data.CUTMIX:
        return MixedLoader(loader, data.MIXUP, data.CUTMIX, len(dataset.classes), device)
    return loader
