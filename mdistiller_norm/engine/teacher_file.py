"""Search for a teacher's weights, and comparison of their metadata with the data."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

from mdistiller_norm.data.base import EvalLoader
from mdistiller_norm.engine.checkpoint import Weights
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.errors import MALFORMED, CheckpointError, first_line
from mdistiller_norm.files import PACKAGE, PROJECT, regular, write_text
from mdistiller_norm.models.base import Network
from mdistiller_norm.models.external import expected_images

MANIFEST = Path("checkpoints/manifest.yaml")
TORCHVISION = "torchvision:"  # prefix of the names of torchvision's weights
ROOTS = (Path(), PROJECT)  # folders that are searched
# mdistiller's downloaded teachers by data set.
PEER_TEACHERS = {
    "cifar100": "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth",
    "tiny_imagenet": "download_ckpts/tiny_imagenet_teachers/{}_vanilla/ti_res18",
}


@dataclass(frozen=True)
class TeacherFile:
    """A file with a teacher's weights."""

    path: Path
    top1: float | None = None  # stated accuracy in percent
    warning: str = ""  # why it may not be the intended teacher
    images: dict[str, Any] | None = None  # size, mean, std, interpolation stated by torchvision

    def cache_path(self, runs: Path) -> Path:
        """Return the path beside which its outputs are cached: in ``runs`` for a file of the installed package."""
        packaged = self.path.resolve().is_relative_to(PACKAGE)
        return runs / "teachers" / self.path.name if packaged else self.path


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Read a manifest: entries with ``file``, ``sha256``, ``model``, ``dataset``, ``top1``, ``command``.

    Entries with a ``method`` are distilled students. A missing manifest has no entries.
    """
    try:
        entries = list(yaml.safe_load(path.read_text()) or []) if path.is_file() else []
        required = [entry.get(key) for entry in entries for key in ("file", "model", "dataset")]
        if all(isinstance(value, str) for value in required):
            return entries
        problem = "each entry must have file, model and dataset"
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        problem = first_line(error)
    raise CheckpointError(f"{path} cannot be read as a manifest: {problem}")


def add_to_manifest(manifest: Path, file: Path, **fields: Any) -> None:
    """Append the entry of a weights file beside the manifest, unless it is listed already."""
    entries = read_manifest(manifest)
    if any(entry["file"] == file.name for entry in entries):
        return
    entry = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **fields}
    before = manifest.read_text(encoding="utf-8").rstrip("\n") + "\n" if entries else ""
    write_text(before + yaml.safe_dump([entry], sort_keys=False, width=1000), manifest)


def manifest_files(root: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files that the manifest of a folder lists, with their entries."""
    manifest = root / MANIFEST
    return [(manifest.parent / entry["file"], entry) for entry in read_manifest(manifest)]


def find_teacher(
    model: str,
    dataset: str,
    weights: str,
    runs: Path,
    command: str,
    epochs: int = 0,
    data: Mapping[str, Any] | None = None,
) -> TeacherFile:
    """Find a teacher's weights: those given, the manifest's, mdistiller's download, or a finished run's.

    ``weights`` is a file, ``torchvision:NAME`` or empty. Of the runs of plain training in ``runs`` (``LOG.PREFIX``),
    those with the same ``data`` (keys of ``DATASET``) come first, then those with as many epochs as the student, then
    the longest, then the best.
    """
    if weights.startswith(TORCHVISION):
        return published(weights.removeprefix(TORCHVISION))
    if weights:
        if not (file := Path(weights)).is_file():
            raise CheckpointError(f"DISTILLER.TEACHER_WEIGHTS: there is no file {weights}")
        listed = {path.resolve(): entry for path, entry in chain(*map(manifest_files, ROOTS))}
        return TeacherFile(file, listed.get(file.resolve(), {}).get("top1"))
    if known := known_teacher(model, dataset):
        return known
    hint = f"set DISTILLER.TEACHER_WEIGHTS, or train it with `{command}`"
    if trained := _finished_run(model, dataset, runs, epochs, data or {}):
        path, top1, length = trained
        warning = f"{path} was trained for {length} epochs, the student for {epochs}: {hint}"
        return TeacherFile(path, top1, warning if length < epochs else "")
    places = f"{MANIFEST}, download_ckpts or the runs of {runs}"
    raise CheckpointError(f"no weights for the teacher {model} on {dataset} in {places}: {hint}")


def pretrained_teacher(
    network: Network, classes: Sequence[str], runs: Path, command: str
) -> TeacherFile:
    """Check that the pretrained weights of a network fit the data set. Its cache is stored in ``runs/pretrained``."""
    if (count := network.pretrained["num_classes"]) != len(classes):
        raise CheckpointError(f"{network.name} is pretrained for {count} classes: run {command}")
    return TeacherFile(runs / "pretrained" / network.name.replace("/", "_"))


def known_teacher(model: str, dataset: str) -> TeacherFile | None:
    """Find a teacher in the manifest or in mdistiller's download folder."""
    for root in ROOTS:
        for path, entry in manifest_files(root):
            if (entry["model"], entry["dataset"]) == (model, dataset) and not entry.get("method"):
                if not path.is_file():
                    raise CheckpointError(f"{path}, listed in {root / MANIFEST}, does not exist")
                if entry.get("sha256") not in (
                    None,
                    hashlib.sha256(path.read_bytes()).hexdigest(),
                ):
                    raise CheckpointError(f"{path} has another SHA-256 than in {root / MANIFEST}")
                return TeacherFile(path, entry.get("top1"))
        if (path := root / PEER_TEACHERS.get(dataset, "").format(model)).is_file():
            return TeacherFile(path)
    return None


def published(name: str) -> TeacherFile:
    """Find torchvision's weights by name, such as ``ResNet34_Weights.IMAGENET1K_V1``; download them if needed."""
    from torchvision.models import get_weight

    try:
        weights = get_weight(name)
        if not (
            path := Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        ).is_file():
            weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"torchvision's weights {name} are missing ({error})") from error
    top1 = weights.meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    return TeacherFile(path, top1, images=expected_images(weights))


def _finished_run(
    model: str, dataset: str, runs: Path, epochs: int, data: Mapping[str, Any]
) -> tuple[Path, float, int] | None:
    found = []
    for path in sorted(runs.glob("*/*/result.json")):
        weights = path.with_name("student_last.pt")
        try:
            result = json.loads(regular(path).read_text())
            names = result["method"], result["student"], result["dataset"]
            node = result["config"]["DATASET"]
            # A part of the images only if the student is trained on the same part.
            parts = [node.get(key, 0) in (0, data.get(key)) for key in ("VAL_SPLIT", "SUBSET")]
            if names == ([], model, dataset) and all(parts) and weights.is_file():
                same_data = all(node.get(key, value) == value for key, value in data.items())
                top1, length = float(result["last"]["top1"]), int(result["epochs"])
                found.append((same_data, weights, top1, length))
        except MALFORMED:  # of another program, or one that is being written
            continue
    best = max(found, key=lambda run: (run[0], run[3] == epochs, run[3], run[2]), default=None)
    return best[1:] if best else None


def check_classes(weights: Weights, classes: Sequence[str]) -> None:
    """Check that weights were trained on the classes of a data set, in this order, if they name their classes."""
    for theirs, ours in zip(weights.about.get("classes", ()), classes, strict=False):
        if theirs != ours:
            hint = "set DATASET.CLASSES as in its training"
            raise CheckpointError(f"{weights.path} has class {theirs!r} for {ours!r}: {hint}")


def check_teacher(
    network: Network, file: TeacherFile, test: EvalLoader, log: Callable[[str], None]
) -> dict[str, Any]:
    """Evaluate the teacher before training; log its accuracy, and warnings if it is lower than expected."""
    top1, top5, loss, *_ = evaluate(network, test)
    if not math.isfinite(loss):
        raise CheckpointError(f"the teacher {file.path} computes NaN or infinite logits")
    log(f"teacher {network.name} from {file.path}: test top-1 {top1:.2f}, top-5 {top5:.2f}")
    chance = 100 / network.num_classes
    if file.warning:
        log(f"warning: {file.warning}")
    if file.top1 is not None and top1 < file.top1 - 1:
        log(f"warning: the teacher's top-1 {top1:.2f} is far below its stated {file.top1:.2f}")
    elif top1 < chance + min(chance, (100 - chance) / 10):
        log(f"warning: the teacher's top-1 {top1:.2f} is about chance")
    return {"name": network.name, "file": str(file.path), "top1": top1, "top5": top5}
