"""CIFAR-10 and CIFAR-100 from the folders that torchvision uses.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset
from mdistiller_norm.download import obtain, read_sources
from mdistiller_norm.errors import DataError, first_line

# mdistiller's constants, with which its published checkpoints were trained.
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
T = TypeVar("T")


class _Stub:
    # Placeholder of a numpy object in a CIFAR file: constructs nothing.
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    # Builds lists, dicts, strings, numbers and recorded arrays; calls nothing that a file names.
    allowed = {"_reconstruct": _Stub, "ndarray": _Stub, "dtype": _Stub, "encode": _encode}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.allowed:
            raise ValueError(f"{module}.{name} is not part of such a file")
        return self.allowed[name]


def _read(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        with path.open("rb") as file:
            return parse(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle may raise any exception
        raise DataError(f"{path} cannot be read as a CIFAR file ({first_line(error)})") from error


def _split(content: dict[str, Any]) -> Split:
    _, shape, dtype, fortran_order, data = content["data"].state
    if dtype.arguments[0] != "u1" or fortran_order:
        raise ValueError("data must be a uint8 array in C order")
    pixels = np.frombuffer(_encode(data, "latin1") if isinstance(data, str) else data, np.uint8)
    images = pixels.reshape(shape[0], 3, 32, 32).transpose(0, 2, 3, 1).copy()
    labels = torch.tensor(content.get("fine_labels") or content["labels"])
    return Split(torch.from_numpy(images), labels)


def cifar100(root: str | Path) -> TensorDataset:
    """Load CIFAR-100: 50,000 + 10,000 images of 32x32 pixels in 100 classes.

    ``root/cifar-100-python`` is downloaded if it is missing, else checked by its content, with images in any order.
    """
    folder = _folder(Path(root), "cifar100")
    classes = _read(folder / "meta", lambda content: tuple(content["fine_label_names"]))
    train, test = _read(folder / "train", _split), _read(folder / "test", _split)
    return TensorDataset("cifar100", train, test, classes, MEAN, STD)


def cifar10(root: str | Path) -> TensorDataset:
    """Load CIFAR-10, 10 classes, from ``cifar-10-batches-py/{data_batch_1,...}``; otherwise as CIFAR-100."""
    folder = _folder(Path(root), "cifar10")
    classes = _read(folder / "batches.meta", lambda content: tuple(content["label_names"]))
    parts = [_read(folder / f"data_batch_{number}", _split) for number in range(1, 6)]
    images, targets = [part.images for part in parts], [part.targets for part in parts]
    train = Split(torch.cat(images), torch.cat(targets))
    test = _read(folder / "test_batch", _split)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return TensorDataset("cifar10", train, test, classes, mean, std)


def _folder(root: Path, name: str) -> Path:
    try:
        return obtain(read_sources()[name][0], root)
    except (DataError, OSError) as error:
        folder = root / FOLDERS[name]
        raise DataError(f"{folder} does not exist and {error}: set DATASET.ROOT") from error
