"""Shards: the images of a data set in few large tar files, for file systems that millions of files are too many for.

The files are in WebDataset's format (``<key>.jpg`` and ``<key>.cls``, the class number as text), so that library reads
them too. Here they are read by position: an index beside the shards says where each image lies, so that the order, the
augmentation and the numbers of the samples are a function of (seed, epoch) exactly as with a folder. The shards must be
on a file system, mounted object storage included; what is read of them are single images.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mdistiller_norm.data.class_tree import EXTENSIONS, Files, ImageSplit, data_root
from mdistiller_norm.data.decode import UNREADABLE
from mdistiller_norm.data.image_folder import MEAN, STD, ImageDataset
from mdistiller_norm.data.image_reader import ImageOptions
from mdistiller_norm.errors import DataError

INDEX, CLASSES = "index.npz", "classes.txt"


class Shards:
    """Images inside tar files.

    Args:
        folder: of the shards.
        shards: their names.
        places: ``[N, 3]`` int64: number of the shard, first byte, number of bytes.
    """

    def __init__(self, folder: Path, shards: list[str], places: NDArray[np.int64]) -> None:
        self.folder, self.shards, self.places = folder, shards, places

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> bytes:
        """See :class:`~mdistiller_norm.data.class_tree.Source`."""
        shard, first, size = self.places[index].tolist()
        with (self.folder / self.shards[shard]).open("rb") as file:
            file.seek(first)
            content: bytes = file.read(size)
        return content

    def name(self, index: int) -> str:
        """The shard and the place in it."""
        shard, first, _ = self.places[index].tolist()
        return f"{self.folder / self.shards[shard]}, byte {first}"


def webdataset(root: Path, options: ImageOptions) -> ImageDataset:
    """A data set in shards, ``root/{train,val}/*.tar`` and ``root/classes.txt``, normalised as ImageNet by default.

    Raises:
        DataError: a split or the names of the classes are missing, a shard is not one, a class number has no name, or
            ``options.classes`` are others.
    """
    root = data_root(root, "webdataset")
    parts = [open_shards(root / split) for split in (["train", "val"] if options.train else ["val"])]
    train, test = parts[0], parts[-1]
    try:
        classes = tuple((root / CLASSES).read_text(encoding="utf-8").rstrip("\n").split("\n"))
    except (OSError, ValueError) as error:
        raise DataError(f"{root / CLASSES} cannot be read ({error}): it names the classes, one a line") from error
    if "" in classes or len(set(classes)) < len(classes):
        raise DataError(f"{root / CLASSES} has an empty line or names a class twice: it names the classes, one a line")
    if options.classes not in ((), classes):
        raise DataError(f"{root / CLASSES} names other classes, or in another order, than those asked for")
    numbers = torch.cat([train.targets, test.targets])
    if unnamed := numbers[(numbers < 0) | (numbers >= len(classes))].tolist():
        raise DataError(f"{root / CLASSES} names {len(classes)} classes and the shards hold class number {unnamed[0]}")
    options = replace(options, mean=options.mean or MEAN, std=options.std or STD)
    return ImageDataset(root.resolve().name, classes, train, test, options)


def open_shards(folder: Path) -> ImageSplit:
    """The images of all shards of a folder, by its index or, where there is none, by the headers in the shards.

    Raises:
        DataError: there are no shards, no images in them, they are cut off, or the index is damaged or of others.
    """
    shards = sorted(path.name for path in folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no shards (*.tar): tools/make_shards.py makes them from a folder")
    split = _indexed(folder, shards) if (folder / INDEX).is_file() else _scan(folder, shards)
    if not len(split.targets):
        raise DataError(f"the shards in {folder} hold no images ({', '.join(EXTENSIONS)}): make them anew")
    return split


def _indexed(folder: Path, shards: list[str]) -> ImageSplit:
    sizes = np.array([(folder / name).stat().st_size for name in shards])
    try:
        with np.load(folder / INDEX) as index:
            names, places, targets = index["shards"].tolist(), index["places"], index["targets"]
        sound = names == shards and places.shape == (len(targets), 3) and places.dtype == targets.dtype == np.int64
        whole = sound and places.min(initial=0) >= 0 and (places[:, 1:].sum(1) <= sizes[places[:, 0]]).all()
    except Exception as error:  # a damaged archive may end in any
        raise DataError(
            f"{folder / INDEX} cannot be read ({error}): remove it, the shards are then looked through"
        ) from error
    if not whole:
        raise DataError(f"{folder / INDEX} is of other shards than those beside it: remove it or make the shards anew")
    return ImageSplit(Shards(folder, names, places), torch.from_numpy(targets))


def _scan(folder: Path, shards: list[str]) -> ImageSplit:
    places: list[tuple[int, int, int]] = []
    targets: list[int] = []
    for number, name in enumerate(shards):
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        end = 0
        try:
            with tarfile.open(folder / name, "r:") as tar:  # not compressed: images are read by their place
                for member in tar:
                    key, extension = os.path.splitext(member.name)
                    if member.isfile() and extension.lower() in EXTENSIONS:
                        images[key] = member.offset_data, member.size
                    elif member.isfile() and extension == ".cls" and (content := tar.extractfile(member)):
                        labels[key] = int(content.read())
                    end = member.offset_data + _padded(member.size if member.isfile() else 0)
            with (folder / name).open("rb") as file:  # tarfile takes a header that it cannot read for the end
                file.seek(end)
                rest = file.read(2 * tarfile.RECORDSIZE + 1)
            if any(rest) or not 2 * tarfile.BLOCKSIZE <= len(rest) <= 2 * tarfile.RECORDSIZE:
                raise ValueError(f"cut off or damaged behind byte {end}")
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"the shard {folder / name} cannot be read ({error}): make it anew") from error
        if images.keys() != labels.keys():
            odd = min(images.keys() ^ labels.keys())
            raise DataError(f"the shard {folder / name} does not hold both an image and a .cls for {odd}")
        places += [(number, *images[key]) for key in images]
        targets += [labels[key] for key in images]
    found = np.array(places, dtype=np.int64).reshape(-1, 3)
    return ImageSplit(Shards(folder, shards, found), torch.tensor(targets, dtype=torch.int64))


def pack(dataset: ImageDataset, folder: Path, per_shard: int) -> dict[str, int]:
    """Write a data set as shards that :func:`webdataset` reads: all of it, or nothing.

    Args:
        dataset: what to write, as it is: nothing is decoded.
        folder: where to; made, and must not hold such a data set yet.
        per_shard: images in a shard.

    Returns:
        The number of shards of each split.

    Raises:
        DataError: there is one already, an image cannot be read, or the folder cannot be written.
    """
    parts = ("train", "val", CLASSES)
    if there := [part for part in parts if (folder / part).exists()]:
        raise DataError(f"{folder / there[0]} is there already: choose another folder, or remove it")
    made, unfinished = not folder.exists(), folder / ".unfinished_shards"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
        splits = {"train": dataset.train, "val": dataset.test}
        counts = {name: _write_split(split, unfinished / name, per_shard) for name, split in splits.items()}
        (unfinished / CLASSES).write_text("\n".join(dataset.classes) + "\n", encoding="utf-8")
        for part in parts:
            (unfinished / part).rename(folder / part)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder} cannot be written ({reason}): choose another folder, or make room") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # it is not empty, or not even there
                folder.rmdir()
    return counts


def _write_split(split: ImageSplit, folder: Path, per_shard: int) -> int:
    """Write the shards of a split and their index, in random order: reading them in sequence is a shuffle."""
    folder.mkdir()
    order = torch.randperm(len(split.source), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [order[first : first + per_shard] for first in range(0, len(order), per_shard)]
    names = [f"{number:06d}.tar" for number in range(len(parts))]
    places: list[tuple[int, int, int]] = []
    for number, part in enumerate(parts):
        with tarfile.open(folder / names[number], "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, index in enumerate(part):
                try:
                    content = split.source.read(index)
                except UNREADABLE as error:
                    raise DataError(f"{split.source.name(index)} cannot be read ({error})") from error
                key = f"{number:06d}{row:08d}"
                places.append((number, _add(tar, f"{key}{_extension(split.source, index)}", content), len(content)))
                _add(tar, f"{key}.cls", str(int(split.targets[index])).encode())
    targets: Tensor = split.targets[torch.tensor(order)]
    with (folder / INDEX).open("wb") as file:
        np.savez(file, shards=np.array(names), places=np.array(places), targets=targets.numpy())
    return len(parts)


def _extension(source: Any, index: int) -> str:
    extension = os.path.splitext(source.name(index))[1].lower() if isinstance(source, Files) else ".jpg"
    return ".jpg" if extension == ".jpeg" else extension


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file; returns the place of its first byte."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - _padded(len(content))


def _padded(size: int) -> int:
    """What a file of a size takes in an archive, without its header."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
