"""Checkpoints: written atomically, read without running code, found by name.

Three kinds of file are read as weights: this project's students (``student_best.pt``: the weights and what they are
for), its run states (``latest.pt``), and others' state dicts: bare or under a usual key (``model`` in mdistiller and
RepDistiller), with or without the prefixes of DataParallel and torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from mdistiller_norm.errors import CheckpointError, first_line
from mdistiller_norm.files import whole_file

# The harmless types that published checkpoints hold beside tensors.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar") if hasattr(np, "_core") else np.core.multiarray.scalar,  # type: ignore[attr-defined]
]

# Where the weights stand in a file that holds more; and what DataParallel and torch.compile put before their names.
_HOLDERS = ("model", "state_dict", "trainable", "model_state_dict", "net")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

MANIFEST = Path("checkpoints/manifest.yaml")
TORCHVISION = "torchvision:"  # before the name of weights that torchvision publishes
# Where mdistiller's users unpacked its teachers.
PEER_TEACHERS = Path("download_ckpts/cifar_teachers")
_SAME = 0.02  # means and deviations of channels that differ by less are of the same images
PROJECT = Path(__file__).resolve().parents[2]


def _list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


# What may stand beside the weights in this project's files, of what is read.
_ABOUT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "variant", "dataset", "type"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("classes", "plugins"), lambda value: _list_of(value, str)),
    "mean": lambda value: _list_of(value, Real) and len(value) in (0, 1, 3),
    "std": lambda value: _list_of(value, Real) and len(value) in (0, 1, 3) and min(value, default=1) > 0,
    "image_size": lambda value: _list_of(value, int) and len(value) == 2 and min(value) > 0,
    "resize": lambda value: isinstance(value, int) and value > 0,
    "top1": lambda value: isinstance(value, Real),
}


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` by :func:`~mdistiller_norm.files.whole_file`.

    Raises:
        CheckpointError: it could not be written (a full disk, a folder without permission).
    """
    try:
        with whole_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); the one before it is intact") from error


class Saver:
    """Writes the checkpoints of a folder, in the order they are given.

    Args:
        folder: exists.
        background: in a thread of its own, from a copy in the host's memory, so that training goes on meanwhile. For
            what lies on a GPU: on the CPU the thread would take a core from the training.
    """

    def __init__(self, folder: Path, background: bool) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: Future[None] | None = None

    def save(self, files: Mapping[str, Any]) -> None:
        """Write contents by file name, once those before are written.

        Raises:
            CheckpointError: one could not be written, of these or of those before.
        """
        self.finish()
        if not self._thread:
            self._write(files)
            return
        distinct = {id(content): content for content in files.values()}
        copies = {key: _on_host(content) for key, content in distinct.items()}
        self._pending = self._thread.submit(self._write, {name: copies[id(content)] for name, content in files.items()})

    def finish(self) -> None:
        """Wait until everything is written; raises as :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            save_atomically(content, self.folder / name)


def _on_host(value: Any) -> Any:
    """A copy of a nest of dictionaries, lists and tuples, its tensors in the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with its attributes: in a state dict's are the versions of its modules
        copied.update((key, _on_host(item)) for key, item in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value


def load(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU with ``weights_only``: data, never code.

    Raises:
        CheckpointError: missing, broken, or holding types that no checkpoint needs.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(
            f"{path} is broken or holds more than weights, and is not loaded ({reason})"
            ": of a network that was saved whole, save its state_dict()"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError, AttributeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): it may be cut off") from error


@dataclass(frozen=True)
class Weights:
    """Weights of one network and what the file says they are for.

    Attributes:
        state: the state dict.
        path: the file.
        about: this project's facts beside the weights (``name``, ``num_classes``, ``dataset``, ``top1`` ...), or empty.
    """

    state: dict[str, Tensor]
    path: Path
    about: dict[str, Any] = field(default_factory=dict)


def load_weights(path: str | Path) -> Weights:
    """The weights of a network out of any of the known kinds of file.

    Raises:
        CheckpointError: as :func:`load`, or a file without weights, or with facts beside them that cannot be.
    """
    path = Path(path)
    content = load(path)
    about: dict[str, Any] = {}
    if isinstance(content, Mapping):
        found = content.get("about")
        about = dict(found) if isinstance(found, Mapping) else {}
        for key, holds in _ABOUT.items():
            if key in about and not holds(about[key]):
                raise CheckpointError(f"{path} is damaged: it says that its {key} is {about[key]!r}")
        for key in _HOLDERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the weights of a network")
    state = {_WRAPPERS.sub("", str(name)): value for name, value in content.items()}
    if any(name.startswith("student.") for name in state):  # a whole distiller, ours or mdistiller's
        state = {name.removeprefix("student."): v for name, v in state.items() if name.startswith("student.")}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no weights under {', '.join(_HOLDERS)} or at its top")
    return Weights(state, path, about)


def load_into(network: nn.Module, weights: Weights, name: str) -> None:
    """Load weights strictly: every name and shape must fit.

    Raises:
        CheckpointError: they are of another network; names the first difference.
    """
    expected = network.state_dict()
    for key in [*expected, *weights.state]:
        wanted, got = expected.get(key), weights.state.get(key)
        if got is None and key.endswith("num_batches_tracked"):
            continue  # files older than PyTorch 0.4.1 lack the counter, which nothing here reads
        if wanted is None or got is None:
            what = "lacks" if got is None else "has the unknown"
            raise CheckpointError(f"{weights.path} does not fit {name}: it {what} tensor {key}")
        if wanted.shape != got.shape:
            raise CheckpointError(
                f"{weights.path} does not fit {name}: {key} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
            )
    try:
        network.load_state_dict(weights.state)
    except (RuntimeError, ValueError) as error:  # a module with a rule of its own, such as torchvision's MNASNet
        raise CheckpointError(f"{weights.path} does not load into {name}: {first_line(error)}") from error


def seen_otherwise(weights: Weights, classes: Sequence[str], seen: Mapping[str, Sequence[float]]) -> str:
    """What tells the images that weights were trained on from others, in a line; empty where nothing does.

    Args:
        weights: a file that says nothing of its images is not doubted.
        classes: of the others, in the order of their numbers.
        seen: ``image_size``, ``mean`` and ``std`` of the others.

    Raises:
        CheckpointError: the classes have other numbers.
    """
    about = weights.about
    for number, (theirs, ours) in enumerate(zip(about.get("classes", ()), classes, strict=False)):
        if theirs != ours:
            raise CheckpointError(
                f"{weights.path} was trained with {theirs!r} as class {number}, which is {ours!r} here: set "
                "DATASET.CLASSES as it was set there, or DISTILLER.TEACHER_WEIGHTS to another file"
            )
    other = [
        f"{key} {list(about[key])} (here {list(ours)})"
        for key, ours in seen.items()
        if any(abs(a - b) > _SAME for a, b in zip(about.get(key, ()), ours, strict=False))
    ]
    return f"{weights.path} was trained on images of another kind: {', '.join(other)}" if other else ""


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's weights on disk.

    Attributes:
        path: the file.
        top1: the accuracy that the manifest or its run states for it, in percent; None if none does.
        doubt: a line that says why it may not be the teacher that is meant, or empty.
    """

    path: Path
    top1: float | None = None
    doubt: str = ""


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``manifest.yaml``: ``file``, ``sha256``, ``model``, ``dataset``, ``top1``, ``command``.

    Those with a ``method`` are distilled students, and never looked up as teachers.

    Raises:
        CheckpointError: not a list of such entries.
    """
    try:
        entries = yaml.safe_load(path.read_text()) or []
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read as a manifest: {first_line(error)}") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("file", "model", "dataset"))
        and isinstance(entry.get("top1", 0), int | float)
        for entry in entries
    ):
        raise CheckpointError(
            f"{path} must be a list of entries with at least file, model and dataset, and with top1 a number"
        )
    return entries


def find_teacher(
    model: str,
    dataset: str,
    weights: str,
    runs: Path,
    train_command: str,
    epochs: int = 0,
    data: Mapping[str, Any] | None = None,
) -> TeacherFile:
    """The file of a teacher: the one given, the manifest's, mdistiller's download folder, or one trained here.

    Args:
        model: the teacher's name.
        dataset: what it was trained on.
        weights: ``DISTILLER.TEACHER_WEIGHTS``: a file, ``torchvision:`` and the name of weights of its, or empty.
        runs: ``LOG.PREFIX``, whose finished runs of plain training on the whole training set are looked at last. Taken
            is the last epoch of the run that is as long as the student's, else of the longest; of several the best.
            Runs with the same ``data`` come before all others.
        train_command: what trains it, for the message.
        epochs: of the student's schedule; a teacher trained here for fewer is in doubt. 0 if that does not matter.
        data: keys of ``DATASET`` that say which images of the data set the student sees, and how.

    Raises:
        CheckpointError: there is none, and this says what trains it; or see :func:`known_teacher`.
    """
    if weights.startswith(TORCHVISION):
        return published(weights.removeprefix(TORCHVISION))
    if weights:
        if not Path(weights).is_file():
            raise CheckpointError(f"DISTILLER.TEACHER_WEIGHTS: there is no file {weights}")
        return TeacherFile(Path(weights), _stated_accuracy(Path(weights)))
    if known := known_teacher(model, dataset):
        return known
    if trained := _trained_here(model, dataset, runs, epochs, data or {}):
        path, top1, length = trained
        doubt = (
            f"the teacher {path} trained for {length} of the {epochs} epochs that its student is to train: if another "
            f"is meant, set DISTILLER.TEACHER_WEIGHTS or train it with `{train_command}`"
        )
        return TeacherFile(path, top1, doubt if length < epochs else "")
    raise CheckpointError(
        f"no weights for the teacher {model} on {dataset} in {MANIFEST}, {PEER_TEACHERS} or the runs of {runs}: set "
        f"DISTILLER.TEACHER_WEIGHTS, or train it with `{train_command}`"
    )


def known_teacher(model: str, dataset: str) -> TeacherFile | None:
    """A teacher's weights from the manifest, or from mdistiller's download folder; None where neither has them.

    Raises:
        CheckpointError: the file of the manifest's entry is missing, or another one.
    """
    for root in dict.fromkeys((Path(), PROJECT)):
        if (root / MANIFEST).is_file():
            for entry in read_manifest(root / MANIFEST):
                if entry["model"] == model and entry["dataset"] == dataset and not entry.get("method"):
                    path = root / MANIFEST.parent / entry["file"]
                    if not path.is_file():
                        raise CheckpointError(f"{root / MANIFEST} names {path}, which is not there")
                    stated = entry.get("sha256")
                    if stated and hashlib.sha256(path.read_bytes()).hexdigest() != stated:
                        raise CheckpointError(f"{path} is not the file {root / MANIFEST} means: its sha256 differs")
                    return TeacherFile(path, entry.get("top1"))
        path = root / PEER_TEACHERS / f"{model}_vanilla" / "ckpt_epoch_240.pth"
        if dataset == "cifar100" and path.is_file():
            return TeacherFile(path)
    return None


def published(name: str) -> TeacherFile:
    """Weights of torchvision's by name, such as ``ResNet34_Weights.IMAGENET1K_V1``, downloaded to its cache if needed.

    Raises:
        CheckpointError: there are none of that name, or they cannot be had.
    """
    from torchvision.models import get_weight

    try:
        weights = get_weight(name)
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"there is no {name} in torchvision ({error})") from error
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not path.is_file():
        try:
            weights.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{weights.url} could not be downloaded ({error}): put it at {path} by hand, or set "
                "DISTILLER.TEACHER_WEIGHTS to a file"
            ) from error
    measured = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return TeacherFile(path, measured.get("acc@1"))


def _trained_here(
    model: str, dataset: str, runs: Path, epochs: int, data: Mapping[str, Any]
) -> tuple[Path, float, int] | None:
    """The weights, accuracy and epochs of the fitting run of plain training, see :func:`find_teacher`."""
    found = []
    for path in sorted(runs.glob("*/*/result.json")):
        weights = path.with_name("student_last.pt")
        try:
            result = json.loads(path.read_text())
            fits = (result["method"], result["student"], result["dataset"]) == ([], model, dataset)
            own = result["config"]["DATASET"]
            if fits and not own.get("VAL_SPLIT") and weights.is_file():
                same = all(own.get(key, value) == value for key, value in data.items())
                found.append((same, weights, float(result["last"]["top1"]), int(result["epochs"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a run of ours, or one that is being written
    best = max(found, key=lambda run: (run[0], run[3] == epochs, run[3], run[2]), default=None)
    return best[1:] if best else None


def _stated_accuracy(path: Path) -> float | None:
    for root in dict.fromkeys((Path(), PROJECT)):
        if (root / MANIFEST).is_file():
            for entry in read_manifest(root / MANIFEST):
                if (root / MANIFEST.parent / entry["file"]).resolve() == path.resolve():
                    return entry.get("top1")
    return None
