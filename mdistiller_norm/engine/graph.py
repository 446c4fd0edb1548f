"""A whole training step as one CUDA graph: recorded once for each batch size, then replayed without Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import Raw


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of dictionaries, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class CapturedStep:
    """A :class:`TrainStep` whose work is replayed from CUDA graphs.

    The inputs of a step are copied into static buffers; everything else it touches (weights, momenta, metrics, the
    learning rate, the factors) stays at one address and is written in place. Before the recording the step is run a few
    times on a side stream, as capturing requires, and what that changed is put back.

    Args:
        step: the eager step.
    """

    WARMUP = 3

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}
        self._pool: Any = None

    def __call__(self, *raw: Tensor) -> None:
        """Train on the batch that ``raw`` names."""
        shapes = tuple(tensor.shape for tensor in raw)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._record(raw)
        graph, inputs = self._graphs[shapes]
        for static, tensor in zip(inputs, raw, strict=True):
            static.copy_(tensor, non_blocking=True)
        graph.replay()

    def _state(self) -> list[Tensor]:
        optimizer = self.step.optimizer.state_dict()
        modules: list[nn.Module] = [self.step.trainable, self.step.meters]
        held = [module.state_dict(keep_vars=True) for module in modules]
        return [*(tensor.data for part in held for tensor in _tensors(part)), *_tensors(optimizer)]

    def _record(self, raw: Raw) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        inputs = [tensor.clone() for tensor in raw]
        state = self._state()
        before = [tensor.detach().clone() for tensor in state]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARMUP):
                self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, saved in zip(state, before, strict=True):
                tensor.copy_(saved)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self.step(*inputs)
        self._pool = graph.pool()
        return graph, inputs
