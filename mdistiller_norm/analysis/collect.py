"""What a network says of a whole test split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller_norm.build import open_checkpoint, placed
from mdistiller_norm.distillers.base import at_least_float32
from mdistiller_norm.engine.teacher_file import MANIFEST
from mdistiller_norm.errors import CheckpointError, ConfigError


class Collected(NamedTuple):
    """Outputs of one network, on the CPU.

    Attributes:
        name: for people.
        logits: ``[N, C]``.
        pooled: ``[N, D]``, the input of the classifier.
        targets: ``[N]``.
        classes: names, C of them.
    """

    name: str
    logits: Tensor
    pooled: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return float((self.logits.argmax(1) == self.targets).double().mean()) * 100


def short_names(paths: Sequence[Path]) -> list[str]:
    """What tells some paths apart: the run folder; where folders repeat, the file's stem too; else the whole path.

    Published weights lie together in a folder, which says nothing of them: they go by their stem.
    """
    folders = [_folder_name(path) for path in paths]
    if len(set(folders)) == len(folders):
        return folders
    longer = [f"{path.parent.name}/{path.name if path.is_dir() else path.stem}" for path in paths]
    return longer if len(set(longer)) == len(longer) else [str(path) for path in paths]


def _folder_name(path: Path) -> str:
    if path.is_dir():
        return path.name
    published = (path.parent / MANIFEST.name).is_file()
    return path.stem if published or not path.parent.name else path.parent.name


@torch.inference_mode()
def collect(
    path: Path, name: str, *, model: str = "", kind: str = "", root: Path = Path("data"), batch_size: int = 250,
    device: torch.device | None = None,
) -> Collected:  # fmt: skip
    """Run a checkpoint over the test split, in eval mode.

    Args:
        path: weights file.
        name: for people.
        model: see :func:`~mdistiller_norm.build.open_checkpoint`, as the next two.
        kind: of the data set.
        root: folder of the data sets.
        batch_size: images at a time.
        device: the CPU when not given.

    Raises:
        UserError: the file, the name or the data cannot be used, or the network says NaN or infinity.
    """
    device = device or torch.device("cpu")
    network, dataset = open_checkpoint(path, model, kind, root)
    network = placed(network, device).eval()
    logits, pooled, targets = [], [], []
    for images, labels in dataset.eval_loader(batch_size, device):
        outputs = network.outputs(images)
        logits.append(at_least_float32(outputs.logits).cpu())
        pooled.append(at_least_float32(outputs.pooled).cpu())
        targets.append(labels.cpu())
    collected = Collected(name, torch.cat(logits), torch.cat(pooled), torch.cat(targets), dataset.classes)
    if not (collected.logits.isfinite().all() and collected.pooled.isfinite().all()):
        raise CheckpointError(f"{path} gives NaN or infinite outputs, which no figure can show: its training diverged")
    return collected


def check_same_classes(networks: Sequence[Collected]) -> None:
    """Refuse to compare networks of different data sets.

    Raises:
        ConfigError: their classes differ.
    """
    for other in networks[1:]:
        if other.classes != networks[0].classes or not torch.equal(other.targets, networks[0].targets):
            raise ConfigError(
                f"{networks[0].name} and {other.name} are of different data sets: they cannot be compared"
            )
