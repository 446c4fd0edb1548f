"""Data sets by name, and the loaders made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mdistiller_norm.data.base import EvalLoader, Split, TensorDataset, TrainLoader
from mdistiller_norm.data.cifar import cifar100
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.memory import MemoryEvalLoader, MemoryTrainLoader
from mdistiller_norm.registry import Registry

DATASETS: Registry[Callable[[Path], TensorDataset]] = Registry("data set")
DATASETS.register("cifar100")(cifar100)
DATASETS.register("digits")(lambda root: digits())

__all__ = [
    "DATASETS", "EvalLoader", "MemoryEvalLoader", "MemoryTrainLoader", "Split", "TensorDataset", "TrainLoader",
    "cifar100", "digits",
]  # fmt: skip
