"""Data sets by name, and the loaders made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from mdistiller_norm.data.base import Dataset, EvalLoader, TrainLoader
from mdistiller_norm.data.cifar import cifar100
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.memory import MemoryEvalLoader, MemoryTrainLoader, Split, TensorDataset
from mdistiller_norm.data.plan import Share
from mdistiller_norm.registry import Registry


class Open(Protocol):
    """Opens a data set."""

    def __call__(self, root: Path) -> Dataset:
        """The data set under ``root``, checked."""


DATASETS: Registry[Open] = Registry("data set")
DATASETS.register("cifar100")(lambda root: cifar100(root))
DATASETS.register("digits")(lambda root: digits())

__all__ = [
    "DATASETS", "Dataset", "EvalLoader", "MemoryEvalLoader", "MemoryTrainLoader", "Share", "Split", "TensorDataset",
    "TrainLoader", "cifar100", "digits",
]  # fmt: skip
