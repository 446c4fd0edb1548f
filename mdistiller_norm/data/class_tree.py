"""Encoded images and their classes: a tree of ``train/<class>/*`` and ``val/<class>/*``, listed and checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mdistiller_norm.errors import DataError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class Source(Protocol):
    """The encoded images of a split."""

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int) -> bytes:
        """The bytes of one.

        Raises:
            OSError: it cannot be read.
        """

    def name(self, index: int) -> str:
        """What a person finds it by."""


class Files:
    """Image files under a folder. Their names are one array, which forked workers share without copying. Messages
    show what is not UTF-8 in a name by its bytes.

    Args:
        folder: that the names are relative to.
        names: of the files.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._names = np.array([os.fsencode(name) for name in names], dtype=bytes)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        """See :class:`Source`."""
        with open(self._path(index), "rb") as file:
            return file.read()

    def name(self, index: int) -> str:
        """The path."""
        return printable(self._path(index))

    def _path(self, index: int) -> str:
        return f"{self.folder}{os.sep}{os.fsdecode(bytes(self._names[index]))}"


def printable(name: str) -> str:
    """A file's name with the bytes in it that are no UTF-8 written out."""
    return name.encode("utf-8", "backslashreplace").decode()


class ImageSplit(NamedTuple):
    """A split: encoded images and their classes ``[N]`` int64."""

    source: Source
    targets: Tensor


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a split's folder, sorted.

    Raises:
        DataError: there is no such folder, nothing in it, or a name that is not UTF-8.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): images belong in {folder}/<class>/") from error
    if not names:
        raise DataError(f"{folder} holds no class folders: images belong in {folder}/<class>/")
    if odd := [name for name in names if printable(name) != name]:
        raise DataError(f"the class folder {printable(odd[0])} in {folder} has a name that is not UTF-8: rename it")
    return names


def scan(folder: Path, classes: Sequence[str]) -> ImageSplit:
    """The images of the class folders of a split and of the folders in them, in the order of their names.

    Raises:
        DataError: a class has no images.
    """
    names: list[str] = []
    targets: list[int] = []
    for number, label in enumerate(classes):
        found = sorted(_images(f"{folder}{os.sep}{label}", f"{label}{os.sep}"))
        if not found:
            raise DataError(f"{folder / label} holds no images ({', '.join(EXTENSIONS)}): complete it or remove it")
        names += found
        targets += [number] * len(found)
    return ImageSplit(Files(folder, names), torch.tensor(targets))


def _images(folder: str, prefix: str) -> Iterator[str]:
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        if entry.name.lower().endswith(EXTENSIONS):
            yield prefix + entry.name
        elif entry.is_dir(follow_symlinks=False):  # a link could lead in a circle
            yield from _images(entry.path, f"{prefix}{entry.name}{os.sep}")


def same_classes(root: Path, found: dict[str, Sequence[str]], wanted: Sequence[str]) -> tuple[str, ...]:
    """The classes that all splits have.

    Args:
        root: of the data set.
        found: the class names of each split.
        wanted: those asked for; empty for all.

    Raises:
        DataError: a split lacks one, or one is asked for twice.
    """
    if twice := [name for number, name in enumerate(wanted) if name in wanted[:number]]:
        raise DataError(f"the class {twice[0]} is asked for twice: DATASET.CLASSES names each once")
    classes = list(wanted) or sorted(set().union(*found.values()))
    for split, names in found.items():
        if missing := sorted(set(classes) - set(names)):
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise DataError(
                f"{root / split} has {len(names)} classes and lacks {len(missing)} ({some}) of the {len(classes)} "
                "wanted: train and val need the same class folders"
            )
    return tuple(classes)


def data_root(root: Path, name: str) -> Path:
    """``root``, or the folder ``name`` in it where only that has splits."""
    inside = [part for part in ("train", "val") if (root / name / part).is_dir()]
    return root / name if inside and not (root / "train").is_dir() and not (root / "val").is_dir() else root
