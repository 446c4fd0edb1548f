"""CIFAR-100 from the ``cifar-100-python`` folder that torchvision and its users have.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009).
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mdistiller_norm.data.memory import Split, TensorDataset
from mdistiller_norm.errors import DataError

# mdistiller's constants, which its published checkpoints were trained with.
MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads lists, strings and numpy arrays; anything else a pickle may ask for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "scalar", "encode", "_frombuffer"}
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no CIFAR-100 file needs")


def _read(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle may end in any
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as a CIFAR-100 file ({reason}): remove it and get it again") from error
    if not isinstance(content, dict) or not keys <= content.keys():
        raise DataError(f"{path} lacks {', '.join(sorted(keys))}: it is not a CIFAR-100 file")
    return content


def _read_split(path: Path, count: int) -> Split:
    content = _read(path, {"data", "fine_labels"})
    try:
        data, labels = np.asarray(content["data"]), np.asarray(content["fine_labels"])
    except ValueError as error:  # lists of unequal length
        raise DataError(f"{path} holds no array of images and of labels ({error})") from error
    if data.shape != (count, 3072) or data.dtype != np.uint8:
        raise DataError(f"{path} holds {data.dtype} data of shape {data.shape}, not uint8 of shape ({count}, 3072)")
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 99:
        raise DataError(f"{path} must hold {count} fine labels in 0..99")
    images = torch.from_numpy(data.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def _download(root: Path) -> None:
    """Make ``root/cifar-100-python``, whole or not at all; several processes may be at it."""
    from torchvision.datasets import CIFAR100  # seconds to import, and needed once in a data set's life

    folder = root / CIFAR100.base_folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar100_") as fresh:
            CIFAR100(fresh, download=True)
            try:
                Path(fresh, CIFAR100.base_folder).rename(folder)
            except OSError:
                if not folder.exists():  # it does if another process was faster
                    raise
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-100 is not in {folder} and downloading {CIFAR100.url} failed ({error}): put the files train, test "
            "and meta there by hand, or set DATASET.ROOT to the folder that holds cifar-100-python"
        ) from error


def cifar100(root: str | Path) -> TensorDataset:
    """CIFAR-100: 50,000 + 10,000 images of 32x32 pixels in 100 classes.

    Args:
        root: the folder that holds ``cifar-100-python/{train,test,meta}``; downloaded there when that is missing. A
            folder that is there is judged by its content, not by checksums, so any order of the images is fine.

    Raises:
        DataError: missing and not to be had, or not CIFAR-100.
    """
    root = Path(root)
    folder = root / "cifar-100-python"
    if not folder.exists():
        _download(root)
    missing = [name for name in ("train", "test", "meta") if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}: remove the folder to download it, or complete it")
    classes = _read(folder / "meta", {"fine_label_names"})["fine_label_names"]
    if not isinstance(classes, list | tuple) or len(classes) != 100:
        got = f"{len(classes)} classes" if isinstance(classes, list | tuple) else f"them as {type(classes).__name__}"
        raise DataError(f"{folder / 'meta'} names {got}, not 100 classes")
    train, test = _read_split(folder / "train", 50_000), _read_split(folder / "test", 10_000)
    return TensorDataset("cifar100", train, test, tuple(map(str, classes)), MEAN, STD, padding=4, flip=True)
