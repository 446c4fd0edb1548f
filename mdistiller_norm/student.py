"""Trained networks, loaded with their metadata from weights files and run folders."""

from __future__ import annotations

import argparse
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mdistiller_norm.config_text import read_settings
from mdistiller_norm.data import DATASETS, Dataset, ImageOptions, open_dataset
from mdistiller_norm.data.cifar import FOLDERS as CIFAR_FOLDERS
from mdistiller_norm.data.folder import data_root
from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError
from mdistiller_norm.models import PREFIXES, VARIANTS, build_model
from mdistiller_norm.models.base import Network
from mdistiller_norm.plugins import import_plugin
from mdistiller_norm.run_folder import CONFIG

Metadata = dict[str, Any]

_REQUIRED = ("name", "variant", "dataset", "classes", "mean", "std", "image_size")
_PREPROCESSING = {"crop": "center", "interpolation": "bilinear, antialiased", "channels": "RGB"}


class Student(NamedTuple):
    """A trained network in eval mode on the CPU, its metadata, and its data set or the reason why it is missing."""

    network: Network
    about: Metadata
    dataset: Dataset | None
    missing: str = ""


def add_student_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the arguments of all commands that load trained networks."""
    add = parser.add_argument
    add("-m", "--model", default="", help="model name (default: from the checkpoint)")
    add("-d", "--dataset", default="", help="data set (default: from the checkpoint, else cifar100)")
    add("-bs", "--batch-size", type=positive, default=batch_size)
    add("--root", type=Path, help="folder of the data sets (default: of the run, else data)")
    add("--device", default="auto")
    add("--plugin", nargs="+", type=import_plugin, metavar="FILE", help="EXPERIMENT.PLUGINS of the run")


def positive(text: str) -> int:
    """Parse an argument that must be a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text}")
    return int(text)


def find_weights(path: Path) -> Path:
    """Return the weights file of a run folder (the best epoch), or of a path that may lack ``.pt``."""
    if path.is_dir():
        for name in ("student_best.pt", "student_last.pt"):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} is not a run folder: it has no student_best.pt")
    with_suffix = path.with_name(f"{path.name}.pt")
    return with_suffix if with_suffix.is_file() and not path.exists() else path


def find_root(path: Path, root: Path | None) -> Path:
    """Return the folder of the data sets: ``root``, else that of the run of a weights file, else ``data``."""
    config = path.parent / CONFIG
    if root is None and config.is_file():
        return Path(str(read_settings(config).get("DATASET.ROOT", "data")))
    return root or Path("data")


def open_checkpoint(
    path: str | Path,
    model: str = "",
    kind: str = "",
    root: Path = Path("data"),
    dataset: Dataset | None = None,
) -> tuple[Network, Dataset]:
    """Return the network of a weights file and the data set that it was trained on.

    Names and data set default to those stored in the file (a ``student_*.pt``), then to cifar100.
    """
    weights = load_weights(path)
    about = weights.about
    name = model or about.get("name", "")
    if not name:
        raise ConfigError(f"{path} does not name its network: add -m, for example -m resnet20")
    kind = kind or about.get("type", about.get("dataset", "cifar100"))
    known_data = dataset is not None or kind in DATASETS
    if about.get("plugins") and not (
        known_data and (name.startswith(PREFIXES) or name in chain(*VARIANTS.values()))
    ):
        plugins = " ".join(about["plugins"])
        raise CheckpointError(f"{path} is {name} on {kind}, registered by a plugin: add --plugin {plugins}")
    if dataset is None:
        known: dict[str, Any] = {key: about[key] for key in ("resize", "variant") if key in about}
        known |= {key: tuple(about[key]) for key in ("mean", "std", "classes") if key in about}
        images = ImageOptions(size=about.get("image_size", [ImageOptions.size])[0], train=False, **known)
        dataset = open_dataset(kind, data_root(root, about.get("dataset", "")), images)
    count, size = len(dataset.classes), dataset.image_size
    network = build_model(name, count, variant=dataset.variant, image_size=size)
    load_into(network, weights, f"{name} with {count} classes")
    return network, dataset


def load_student(
    path: Path, model: str = "", kind: str = "", root: Path | None = None, with_data: bool = True
) -> Student:
    """Load a weights file or the best weights of a run folder, as :func:`open_checkpoint` does.

    The data set may be missing if the file has the metadata of a ``student_*.pt``; it is not opened without
    ``with_data``.
    """
    path = find_weights(path)
    weights, root = load_weights(path), find_root(path, root)
    about, kind = weights.about, kind or weights.about.get("type", "")
    complete = about.keys() >= {*_REQUIRED}
    cifar = root / CIFAR_FOLDERS.get(kind, "")
    try:
        if complete and not with_data:
            raise DataError("not requested")
        if complete and kind in CIFAR_FOLDERS and not cifar.exists():  # would be downloaded
            raise DataError(f"{cifar} does not exist")
        network, dataset = open_checkpoint(path, model, kind, root)
    except DataError as error:
        if not complete:
            raise
        variant, size = about["variant"], tuple(about["image_size"])
        network = build_model(model or about["name"], len(about["classes"]), variant=variant, image_size=size)
        load_into(network, weights, f"{network.name} with {network.num_classes} classes")
        return Student(network.eval(), _metadata(about, network), None, str(error))
    facts = {
        "variant": dataset.variant, "dataset": dataset.name, "classes": list(dataset.classes),
        "mean": list(dataset.mean), "std": list(dataset.std), "image_size": list(dataset.image_size),
    }  # fmt: skip
    return Student(network.eval(), _metadata(about | facts, network), dataset)


def _metadata(about: Metadata, network: Network) -> Metadata:
    """Return the facts of a weights file and the preprocessing of its images."""
    kept = {key: about[key] for key in (*_REQUIRED, "top1") if key in about} | {"name": network.name}
    from_files = about.get("type") in ("imagenet", "image_folder", "webdataset")
    resize = about.get("resize", 256) if from_files else about["image_size"][0]
    return kept | _PREPROCESSING | {"resize": resize}
