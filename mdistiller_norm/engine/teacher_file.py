"""Which file a teacher's weights are in, and whether they fit what it is to teach."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mdistiller_norm.engine.checkpoint import Weights
from mdistiller_norm.errors import CheckpointError, first_line
from mdistiller_norm.files import PROJECT

MANIFEST = Path("checkpoints/manifest.yaml")
TORCHVISION = "torchvision:"  # before the name of weights that torchvision publishes
# Where mdistiller's users unpacked its teachers.
PEER_TEACHERS = Path("download_ckpts/cifar_teachers")
_SAME = 0.02  # means and deviations of channels that differ by less are of the same images


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's weights on disk.

    Attributes:
        path: the file.
        top1: the accuracy that the manifest or its run states for it, in percent; None if none does.
        warning: a line that says why it may not be the teacher that is meant, or empty.
    """

    path: Path
    top1: float | None = None
    warning: str = ""


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The entries of a ``manifest.yaml``: ``file``, ``sha256``, ``model``, ``dataset``, ``top1``, ``command``.

    Those with a ``method`` are distilled students, and never looked up as teachers. None (an empty list) where there is
    no such file.

    Raises:
        CheckpointError: not a list of such entries.
    """
    if not path.is_file():
        return []
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
    for root in _roots():
        manifest = root / MANIFEST
        for entry in read_manifest(manifest):
            if entry["model"] == model and entry["dataset"] == dataset and not entry.get("method"):
                path = manifest.parent / entry["file"]
                if not path.is_file():
                    raise CheckpointError(f"{manifest} names {path}, which is not there")
                stated = entry.get("sha256")
                if stated and hashlib.sha256(path.read_bytes()).hexdigest() != stated:
                    raise CheckpointError(f"{path} is not the file {manifest} means: its sha256 differs")
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
    for root in _roots():
        for entry in read_manifest(root / MANIFEST):
            if (root / MANIFEST.parent / entry["file"]).resolve() == path.resolve():
                return entry.get("top1")
    return None


def _roots() -> Iterable[Path]:
    """Where checkpoints are looked for: here, then in the project."""
    return dict.fromkeys((Path(), PROJECT))


def check_preprocessing(weights: Weights, classes: Sequence[str], seen: Mapping[str, Sequence[float]]) -> str:
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
