"""Trained networks, loaded with their metadata from weights files and run folders."""

from pathlib import Path
from typing import Any, NamedTuple

from mdistiller_norm.config_keys import read_settings
from mdistiller_norm.data import DATASETS, Dataset, ImageOptions, open_dataset
from mdistiller_norm.data.cifar import FOLDERS as CIFAR_FOLDERS
from mdistiller_norm.data.folder import data_root
from mdistiller_norm.engine.checkpoint import Weights, load_into, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError
from mdistiller_norm.models import PREFIXES, VARIANTS, Network, build_model
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


def find_weights(path: Path) -> Path:
    """Return the weights file of a run folder (the best epoch), or of a path that may lack ``.pt``."""
    path = path / "student_best" if path.is_dir() else path
    with_suffix = path.with_name(f"{path.name}.pt")
    return with_suffix if with_suffix.is_file() and not path.exists() else path


def _find_root(path: Path, root: Path | None) -> Path:
    config = path.parent / CONFIG
    if root is None and config.is_file():
        return Path(str(read_settings(config).get("DATASET.ROOT", "data")))
    return root or Path("data")


def open_checkpoint(
    path: str | Path,
    model: str = "",
    kind: str = "",
    root: Path | None = None,
    dataset: Dataset | None = None,
) -> tuple[Network, Dataset]:
    """Return the network of a weights file or run folder in eval mode, and the data set that it was trained on.

    Names and data set default to those stored in the file (a ``student_*.pt``), then to cifar100.
    """
    path = find_weights(Path(path))
    weights = load_weights(path)
    dataset = _open_data(weights, model, kind, _find_root(path, root), dataset)
    return _load(weights, model, dataset.metadata()), dataset


def load_student(
    path: Path, model: str = "", kind: str = "", root: Path | None = None, with_data: bool = True
) -> Student:
    """Load a weights file or the best weights of a run folder, as :func:`open_checkpoint` does.

    The data set may be missing if the file has the metadata of a ``student_*.pt``; it is not opened without
    ``with_data``, and CIFAR-100 is not downloaded.
    """
    path = find_weights(path)
    weights, root = load_weights(path), _find_root(path, root)
    about, dataset, missing = weights.about, None, "not requested"
    complete = about.keys() >= {*_REQUIRED}
    kind = kind or about.get("type", "")
    cifar = root / CIFAR_FOLDERS.get(kind, "")
    if complete and kind in CIFAR_FOLDERS and not cifar.exists():  # would be downloaded
        missing = f"{cifar} does not exist"
    elif with_data or not complete:
        try:
            dataset = _open_data(weights, model, kind, root)
            about = about | dataset.metadata()
        except DataError as error:
            if not complete:
                raise
            missing = str(error)
    network = _load(weights, model, about)
    kept = {key: about[key] for key in (*_REQUIRED, "top1", "epoch") if key in about}
    kept |= {"name": network.name, "resize": about["image_size"][0]} | _PREPROCESSING
    if kind not in (*CIFAR_FOLDERS, "digits", "tiny_imagenet"):
        kept["resize"] = about.get("resize", kept["resize"])
    return Student(network, kept, dataset, missing)


def _open_data(
    weights: Weights, model: str, kind: str, root: Path, dataset: Dataset | None = None
) -> Dataset:
    about = weights.about
    if not (name := model or about.get("name", "")):
        raise ConfigError(
            f"{weights.path} does not name its network: add -m, for example -m resnet20"
        )
    kind = kind or about.get("type", about.get("dataset", "cifar100"))
    built_in = name.startswith(PREFIXES) or any(name in models for models in VARIANTS.values())
    if about.get("plugins") and not (built_in and (dataset is not None or kind in DATASETS)):
        raise CheckpointError(
            f"{weights.path} is {name} on {kind}, registered by a plugin: add --plugin {' '.join(about['plugins'])}"
        )
    if dataset is not None:
        return dataset
    known = {key: about[key] for key in about.keys() & {"resize", "variant", "val_split"}}
    known |= {key: tuple(about[key]) for key in ("mean", "std", "classes") if key in about}
    images = ImageOptions(
        size=about.get("image_size", [ImageOptions.size])[0], train=False, **known
    )
    return open_dataset(kind, data_root(root, about.get("dataset", "")), images)


def build(about: Metadata) -> Network:
    """Build the network that metadata describe, without its weights."""
    size = tuple(about["image_size"])
    return build_model(
        about["name"], len(about["classes"]), variant=about["variant"], image_size=size
    )


def _load(weights: Weights, model: str, about: Metadata) -> Network:
    network = build(about | {"name": model or weights.about["name"]})
    load_into(network, weights, f"{network.name} with {network.num_classes} classes")
    return network.eval()
