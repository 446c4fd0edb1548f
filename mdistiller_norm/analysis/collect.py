"""Outputs of a network for a whole test split."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mdistiller_norm.build import placed
from mdistiller_norm.data import Dataset
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models.base import Network


class Collected(NamedTuple):
    """Outputs of one network, on the CPU."""

    name: str  # label of the network
    logits: Tensor  # [N, C]
    pooled: Tensor  # [N, D], the input of the classifier
    targets: Tensor  # [N]
    classes: tuple[str, ...]  # names of the C classes

    @property
    def top1(self) -> float:
        return float((self.logits.argmax(1) == self.targets).double().mean()) * 100  # percent


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return distinct labels of weights files: the run folder, the stem of other files, or the whole path."""
    in_runs = ("student_", "latest", "best")
    names = [path.parent.name if path.name.startswith(in_runs) else path.stem for path in paths]
    return (
        names if len(set(names)) == len(paths) and all(names) else [str(path) for path in paths]
    )


@torch.inference_mode()
def collect(
    network: Network, dataset: Dataset, name: str, batch_size: int, device: torch.device
) -> Collected:
    """Run a network over the test split in eval mode and return its outputs."""
    network = placed(network, device).eval()
    batches = []
    for images, targets in dataset.eval_loader(batch_size, device):
        outputs = network.outputs(images)
        batches.append(
            (outputs.logits.float().cpu(), outputs.pooled.float().cpu(), targets.cpu())
        )
    logits, pooled, labels = map(torch.cat, zip(*batches, strict=True))
    if not (logits.isfinite().all() and pooled.isfinite().all()):
        raise CheckpointError(f"{name} gives NaN or infinite outputs: its training diverged")
    return Collected(name, logits, pooled, labels, dataset.classes)


def check_same_classes(networks: Sequence[Collected]) -> None:
    """Check that all networks were run over the same data set."""
    for first, other in pairwise(networks):
        if other.classes != first.classes or not torch.equal(other.targets, first.targets):
            raise ConfigError(f"{first.name} and {other.name} are of different data sets")
