"""CIFAR-100 from the ``cifar-100-python`` folder that torchvision uses.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset
from mdistiller_norm.download import obtain, read_sources
from mdistiller_norm.errors import DataError

# mdistiller's constants, with which its published checkpoints were trained.
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
T = TypeVar("T")


class _Recorded:
    """Placeholder of a numpy object in a CIFAR file: records arguments and state, and constructs nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Builds lists, dicts, strings, numbers and recorded arrays; imports and calls nothing that a file names."""

    allowed = {"_reconstruct": _Recorded, "ndarray": _Recorded, "dtype": _Recorded, "encode": _encode}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.allowed:
            raise ValueError(f"{module}.{name} is not part of such a file")
        return self.allowed[name]


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        with path.open("rb") as file:
            return parse(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle may raise any exception
        reason = f"{type(error).__name__}: {' '.join(f'{error}'.split())}"
        raise DataError(
            f"{path} cannot be read as a CIFAR-100 file ({reason}): remove it and download it"
        ) from error


def _split(content: dict[str, Any]) -> Split:
    _, shape, dtype, fortran_order, data = content["data"].state
    if dtype.arguments[0] != "u1" or fortran_order:
        raise ValueError("data must be a uint8 array in C order")
    pixels = np.frombuffer(_encode(data, "latin1") if isinstance(data, str) else data, np.uint8)
    images = pixels.reshape(shape[0], 3, 32, 32).transpose(0, 2, 3, 1).copy()
    return Split(torch.from_numpy(images), torch.tensor(content["fine_labels"]))


def _class_names(content: dict[str, Any]) -> tuple[str, ...]:
    names = content["fine_label_names"]
    if not isinstance(names, list) or len(names) != 100:
        raise ValueError("fine_label_names must be a list of 100 names")
    return tuple(names)


def cifar100(root: str | Path) -> TensorDataset:
    """Load CIFAR-100: 50,000 + 10,000 images of 32x32 pixels in 100 classes.

    Args:
        root: folder with ``cifar-100-python/{train,test,meta}``, which is downloaded if it is missing. An existing
            folder is checked by its content, not by checksums, so the images may be in any order.
    """
    root = Path(root)
    folder = root / "cifar-100-python"
    if not folder.exists():
        try:
            obtain(read_sources()["cifar100"][0], root)
        except (DataError, OSError) as error:
            raise DataError(
                f"{folder} does not exist and {error}: put the files train, test and meta into it, or set DATASET.ROOT "
                "to the folder that contains cifar-100-python"
            ) from error
    missing = [name for name in ("train", "test", "meta") if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: remove the folder to download it, or complete it"
        )
    classes = _read(folder / "meta", _class_names)
    train, test = _read(folder / "train", _split), _read(folder / "test", _split)
    if (len(train), len(test)) != (50_000, 10_000):
        raise DataError(f"{folder} must contain 50,000 + 10,000 images, got {len(train):,} + {len(test):,}")
    dataset = TensorDataset("cifar100", train, test, classes, MEAN, STD)
    dataset.check()
    return dataset
