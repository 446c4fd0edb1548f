"""The teacher: frozen, without gradients, outside of everything that trains or is saved."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from mdistiller_norm.distillers.base import Need
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Batch, Outputs

Raw = tuple[Tensor, ...]


def weights_hash(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers: names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Teacher(Protocol):
    """What a training step asks of a teacher.

    Attributes:
        hash: of its weights.
        network: as it was loaded, frozen, in eval mode.
        extra: how many tensors it adds to what names a batch.
    """

    hash: str
    network: Network
    extra: int

    def feed(self, batches: Iterator[Raw]) -> Iterator[Raw]:
        """What names each batch, and after it the tensors that :meth:`__call__` wants besides the batch."""

    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        """What the teacher says of a batch."""


class _Reads(nn.Module):
    """A network's forward that gives just what is needed of its outputs."""

    def __init__(self, network: Network, need: Need) -> None:
        super().__init__()
        self.network, self.need = network, need

    def forward(self, images: Tensor) -> Outputs:
        outputs = self.network.outputs(images)
        if self.need < Need.MAPS:
            return Outputs(outputs.logits, (), (), outputs.pooled)
        return outputs


def _is_fresh(value: object, graph: torch.fx.GraphModule) -> bool:
    """Whether it is the output of a convolution, read once."""
    if not (isinstance(value, torch.fx.Node) and value.op == "call_module" and len(value.users) == 1):
        return False
    return isinstance(graph.get_submodule(str(value.target)), nn.Conv2d)


def _add_to(fresh: Tensor, other: Tensor) -> Tensor:
    """The sum, in the memory of its first term where it has its shape and type."""
    if isinstance(other, Tensor) and (other.shape, other.dtype) == (fresh.shape, fresh.dtype):
        return fresh.add_(other)
    return fresh + other


def folded(network: Network, need: Need) -> nn.Module:
    """A copy of a frozen network, its batch norms folded into the convolutions before them where they directly follow.

    Equal to the network up to float rounding. Maps that are not needed are not computed. A network of a user's own that
    cannot be traced is run as it is.

    Args:
        network: in eval mode; stays as it is.
        need: what its outputs are read for.

    Returns:
        A module from images to :class:`Outputs` (without maps, where they are not needed).
    """
    whole = _Reads(copy.deepcopy(network), need).eval()
    try:
        result = fuse(whole, inplace=True, no_trace=False)
    except Exception:  # somebody's own network under a tracer may raise anything
        return whole.requires_grad_(False)
    assert isinstance(result, torch.fx.GraphModule)
    for node in result.graph.nodes:
        # Tracing turns the residual blocks' += into +. Where the sum's first term is a tensor that nothing else reads
        # (which a module's output need not be: nn.Identity's is its input), adding in place saves a pass over memory.
        if node.op == "call_function" and node.target is operator.add and _is_fresh(node.args[0], result):
            node.target = _add_to
    result.recompile()
    for parameter in result.parameters():
        parameter.requires_grad_(False)
    return result.to(memory_format=torch.channels_last)


class LiveTeacher:
    """A teacher that runs in every step.

    Not an ``nn.Module``, so that no optimizer, wrapper or checkpoint can pick it up by accident.

    Args:
        network: trained; put into eval mode and frozen.
        need: what the distillers read.
        autocast: the dtype of its pass, None for float32.
        train_mode: run a copy with batch statistics, whose running averages drift (OFD's reference does this).
        compiler: turns the folded network into something faster; None to run it as it is.
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
        self.hash = weights_hash(network)
        self.need, self.autocast = need, autocast
        self._runs: Callable[[Tensor], Outputs]
        if train_mode:
            self._runs = _Reads(copy.deepcopy(network), need).train()
        else:
            module = folded(network, need)
            with self._arithmetic(next(network.parameters()).device):  # what is compiled is a program for just this
                self._runs = compiler(module) if compiler else module

    def feed(self, batches: Iterator[Raw]) -> Iterator[Raw]:
        """See :class:`Teacher`: nothing is added."""
        return batches

    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        """See :class:`Teacher`."""
        return self.run(batch.images)

    @contextmanager
    def _arithmetic(self, device: torch.device) -> Iterator[None]:
        # What the student's loss may save for its backward must not be inference tensors, and copying maps costs more
        # than no_grad's bookkeeping: only the small outputs leave inference mode, as copies.
        mode = torch.no_grad() if self.need is Need.MAPS else torch.inference_mode()
        with mode, torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            yield

    def run(self, images: Tensor) -> Outputs:
        """The outputs for images ``[B, 3, H, W]``."""
        with self._arithmetic(images.device):
            outputs = self._runs(images)
        if self.need is Need.MAPS:
            return outputs
        return Outputs(outputs.logits.clone(), (), (), outputs.pooled.clone())
