"""The teacher: frozen, without gradients, outside of everything that is trained or saved."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse

from mdistiller_norm.data.base import Tensors
from mdistiller_norm.distillers.base import Need
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Batch, Outputs


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 of a network's parameters and buffers: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Forward(nn.Module):
    def __init__(self, network: Network, need: Need) -> None:
        super().__init__()
        self.network, self.need = network, need

    def forward(self, images: Tensor) -> Outputs:
        outputs = self.network.outputs(images)
        return outputs if self.need is Need.MAPS else outputs._replace(features=(), preacts=())


def folded(network: Network, need: Need) -> nn.Module:
    """Return a copy of a network in eval mode, its batch norms folded into the convolutions before them.

    Unneeded maps are not computed. A network that cannot be traced, or calls a layer twice, is copied as it is.
    """
    module: nn.Module = _Forward(copy.deepcopy(network), need).eval()
    with suppress(Exception):  # tracing a user's network may raise anything
        traced = symbolic_trace(module)
        names = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        repeated = [traced.get_submodule(name) for name in set(names) if names.count(name) > 1]
        if not list(nn.ModuleList(repeated).parameters()):  # folded at most once each
            module = fuse(traced, True, True).to(memory_format=torch.channels_last)
    return module.requires_grad_(False)


class Teacher:
    """A trained network that runs in every step. Not an ``nn.Module``: no optimizer or checkpoint includes it.

    Args:
        network: put into eval mode and frozen.
        need: outputs that the distillers read.
        autocast: dtype of the forward pass, None for float32.
        train_mode: use batch statistics and update a copy's running averages, as OFD's reference code does.
        compiler: compiles the folded network; None to run it as it is.

    Attributes:
        extra: number of tensors that :meth:`with_teacher_outputs` appends to a batch.
        hash: of the weights.
    """

    extra = 0

    def __init__(
        self,
        network: Network,
        need: Need = Need.MAPS,
        autocast: torch.dtype | None = None,
        train_mode: bool = False,
        compiler: Callable[[nn.Module], Callable[[Tensor], Outputs]] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.hash, self.need, self.autocast = weights_hash(network), need, autocast
        if train_mode:
            self._runs: Callable[[Tensor], Outputs] = _Forward(
                copy.deepcopy(network), need
            ).train()
        else:
            module = folded(network, need)
            self._runs = compiler(module) if compiler else module

    def with_teacher_outputs(self, batches: Iterator[Tensors]) -> Iterator[Tensors]:
        """Append to each raw batch the tensors that :meth:`__call__` needs."""
        return batches

    @torch.no_grad()
    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        device = batch.images.device.type
        with torch.autocast(device, self.autocast, enabled=bool(self.autocast)):
            return self._runs(batch.images)
