"""The teacher: frozen, without gradients, outside of everything that trains or is saved."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn

from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Batch, Outputs


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Teacher:
    """A fixed function from a batch to a network's outputs.

    Not an ``nn.Module``, so that no optimizer, wrapper or checkpoint can pick it up by accident.

    Args:
        network: trained; put into eval mode and frozen.
        autocast: the dtype of its pass, None for float32.
        train_mode: run a copy with batch statistics, whose running averages drift (OFD's reference does this).
    """

    def __init__(self, network: Network, autocast: torch.dtype | None = None, train_mode: bool = False) -> None:
        self.network = network.eval().requires_grad_(False)
        self.hash = weights_hash(network)
        self.autocast = autocast
        self._runs = copy.deepcopy(network).train() if train_mode else network

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of the batch."""
        with torch.autocast(batch.images.device.type, self.autocast, enabled=self.autocast is not None):
            return self._runs.outputs(batch.images)
