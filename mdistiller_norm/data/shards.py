"""Shards: the images of a data set in few large tar files, for file systems with a limited number of files.

The files have WebDataset's format (``<key>.jpg`` and ``<key>.cls``, the class number as text). An index holds the
position of each image, so that images are read in any order, as from a folder.
"""

import io
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mdistiller_norm.data.folder import (
    EXTENSIONS,
    MEAN,
    STD,
    ImageDataset,
    data_root,
    split_names,
)
from mdistiller_norm.data.loader import ImageOptions, ImageSplit
from mdistiller_norm.data.memory import check_range
from mdistiller_norm.errors import DataError
from mdistiller_norm.files import command, regular

INDEX, CLASSES = "index.npz", "classes.txt"
Ints = NDArray[np.int64]


class Shards(ImageSplit):
    """Images in tar files; ``entries`` ``[N, 3]`` are shard number, first byte and number of bytes."""

    def __init__(self, folder: Path, shards: list[str], entries: Ints, targets: Ints) -> None:
        super().__init__(folder, entries, torch.from_numpy(targets))
        self.shards = shards

    def read(self, index: int) -> bytes:
        shard, first, size = self.entries[index].tolist()
        with (self.folder / self.shards[shard]).open("rb") as file:
            file.seek(first)
            content: bytes = file.read(size)
        return content

    def name(self, index: int) -> str:
        shard, first, _ = self.entries[index].tolist()
        return f"{self.folder / self.shards[shard]}, byte {first}"


def webdataset(root: Path, options: ImageOptions) -> ImageDataset:
    """Open shards, ``root/{train,val}/*.tar`` and ``root/classes.txt``, normalised as ImageNet by default."""
    root = data_root(root, "webdataset")
    splits = [open_shards(root / name) for name in split_names(options)]
    path = root / CLASSES
    try:
        classes = tuple(regular(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))
        if "" in classes or len(set(classes)) < len(classes):
            raise ValueError("empty or repeated name")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must contain one class name per line ({error})") from error
    if options.classes not in ((), classes):
        raise DataError(f"{path} must contain the classes of DATASET.CLASSES in the same order")
    for split in splits:
        check_range(split.targets, len(classes), f"{split.folder}: class numbers of {path}")
    options = replace(options, mean=options.mean or MEAN, std=options.std or STD)
    return ImageDataset(root.resolve().name, classes, splits, options)


def open_shards(folder: Path) -> Shards:
    """List the images of all shards of a folder, from its index or, without one, from the headers of the tar files."""
    shards = sorted(path.name for path in folder.glob("*.tar"))
    positions, targets = (_read_index if (folder / INDEX).is_file() else _scan)(folder, shards)
    if not len(targets):
        hint = f"see {command('shards')}; without val, set DATASET.VAL_SPLIT"
        raise DataError(f"{folder} has no shards (*.tar) with images: {hint}")
    return Shards(folder, shards, positions, targets)


def _read_index(folder: Path, shards: list[str]) -> tuple[Ints, Ints]:
    sizes = np.array([(folder / name).stat().st_size for name in shards])
    try:
        with np.load(folder / INDEX) as index:
            names = index["shards"].tolist()
            positions, targets = index["places"], index["targets"]
        shard, first, size = positions.T
        if names != shards or len(shard) != len(targets) or (first + size > sizes[shard]).any():
            raise ValueError("it was written for others")
        return positions, targets.astype(np.int64)
    except Exception as error:  # a damaged archive may raise any exception
        raise DataError(
            f"{folder / INDEX} does not match the shards ({error}): remove it"
        ) from error


def _scan(folder: Path, shards: list[str]) -> tuple[Ints, Ints]:
    positions: list[tuple[int, int, int]] = []
    targets: list[int] = []
    for number, name in enumerate(shards):
        images: dict[str, tuple[int, int, int]] = {}
        labels: dict[str, int] = {}
        try:
            # Not compressed: images are read by position.
            with tarfile.open(regular(folder / name), "r:") as tar:
                for member in tar:
                    key, extension = os.path.splitext(member.name)
                    if not member.isfile() or os.path.basename(key).startswith("._"):  # of macOS
                        continue
                    if extension.lower() in EXTENSIONS:
                        images[key] = number, member.offset_data, member.size
                    elif extension == ".cls" and (content := tar.extractfile(member)):
                        labels[key] = int(content.read())
            # tarfile ends without an error at a header that it cannot read.
            with (folder / name).open("rb") as file:
                file.seek(tar.offset)
                rest = file.read(2 * tarfile.RECORDSIZE + 1)
            if any(rest) or not 2 * tarfile.BLOCKSIZE <= len(rest) <= 2 * tarfile.RECORDSIZE:
                raise ValueError(f"truncated or damaged after byte {tar.offset}")
            if unpaired := images.keys() ^ labels.keys():
                raise ValueError(f"{min(unpaired)} must have both an image and a .cls")
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"the shard {folder / name} cannot be read ({error})") from error
        positions += images.values()
        targets += [labels[key] for key in images]
    return np.array(positions, np.int64).reshape(-1, 3), np.array(targets, np.int64)


def pack(dataset: ImageDataset, folder: Path, per_shard: int) -> dict[str, int]:
    """Write the files of a data set as shards, completely or not at all; return their number for each split."""
    if (folder / "train").exists() or (folder / "val").exists():
        raise DataError(f"{folder} has shards: choose another folder, or remove them")
    unfinished = folder / ".unfinished_shards"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
        counts = {"train": _write_split(dataset.train, unfinished / "train", per_shard)}
        if dataset.test is not dataset.train:
            counts["val"] = _write_split(dataset.test, unfinished / "val", per_shard)
        (unfinished / CLASSES).write_text("\n".join(dataset.classes) + "\n", encoding="utf-8")
        for path in unfinished.iterdir():
            path.rename(folder / path.name)
    except OSError as error:
        raise DataError(f"the shards in {folder} cannot be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return counts


def _write_split(split: ImageSplit, folder: Path, per_shard: int) -> int:
    folder.mkdir(parents=True)
    # A random order, so that reading the shards in sequence is a shuffle.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).tolist()
    for first in range(0, len(order), per_shard):
        number = first // per_shard
        with tarfile.open(folder / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, index in enumerate(order[first : first + per_shard]):
                suffix = os.path.splitext(split.name(index))[1].lower().replace("jpeg", "jpg")
                contents = {
                    suffix: split.read(index),
                    ".cls": b"%d" % split.targets[index].item(),
                }
                for extension, content in contents.items():
                    member = tarfile.TarInfo(f"{number:06d}{row:08d}{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    written = open_shards(folder)
    with (folder / INDEX).open("wb") as file:
        np.savez(file, shards=written.shards, places=written.entries, targets=written.targets)
    return len(written.shards)
