"""The command ``shards``: pack folders of images into tar files."""

from __future__ import annotations

import argparse
from pathlib import Path

from mdistiller_norm.data import Dataset, ImageOptions, image_folder
from mdistiller_norm.data.folder import MEAN, STD
from mdistiller_norm.data.shards import pack
from mdistiller_norm.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``shards``."""
    parser.epilog = f"example: {parser.prog} --root data/imagenet --out data/imagenet_shards"
    parser.add_argument("--root", required=True, type=Path, help="folder with train and val")
    parser.add_argument("--out", required=True, type=Path, help="folder of the shards; created if missing")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images per tar file")
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that check the images first"
    )


def main(options: argparse.Namespace) -> int:
    """Check all images and pack them."""
    if options.per_shard < 1 or options.workers < 0:
        raise ConfigError(
            f"--per-shard must be >= 1 and --workers >= 0, got {options.per_shard} and {options.workers}"
        )
    dataset = image_folder(options.root, ImageOptions(mean=MEAN, std=STD, workers=options.workers))
    if broken := list_unreadable(dataset):
        raise DataError(
            f"{options.root}: {len(broken)} images cannot be read (listed above): replace or remove them"
        )
    for name, count in pack(dataset, options.out, options.per_shard).items():
        print(f"{count} shards in {options.out / name}")
    return 0


def list_unreadable(dataset: Dataset) -> list[str]:
    """Read all images of a data set, print the names of the unreadable files and return them."""
    print(dataset.summary())
    broken = dataset.unreadable()
    print("\n".join([*broken, f"{len(broken)} images cannot be read"]))
    return broken
