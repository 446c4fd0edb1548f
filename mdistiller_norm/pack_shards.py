"""The command ``shards``: pack folders of images into tar files."""

import argparse

from mdistiller_norm.data import Dataset, ImageOptions, image_folder
from mdistiller_norm.data.folder import MEAN, STD
from mdistiller_norm.data.shards import pack
from mdistiller_norm.errors import DataError


def main(options: argparse.Namespace) -> int:
    """Check all images and pack them."""
    # Without val, only train is opened: the fraction itself is not used.
    fraction = 0.0 if (options.root / "val").is_dir() else 0.5
    images = ImageOptions(mean=MEAN, std=STD, workers=max(options.workers, 0), val_split=fraction)
    dataset = image_folder(options.root, images)
    if broken := list_unreadable(dataset):
        problem = f"{len(broken)} images cannot be read (listed above)"
        raise DataError(f"{options.root}: {problem}: replace them")
    counts = pack(dataset, options.out, options.per_shard)
    for name, count in counts.items():
        print(f"{count} shards in {options.out / name}")
    if "val" not in counts:
        print(f"{options.root} has no folder val: train on the shards with DATASET.VAL_SPLIT")
    return 0


def list_unreadable(dataset: Dataset) -> list[str]:
    """Read all images of a data set, print the names of the unreadable files and return them."""
    print(dataset.summary())
    broken = dataset.unreadable()
    print("\n".join([*broken, f"{len(broken)} images cannot be read"]))
    return broken
