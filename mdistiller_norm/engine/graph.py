"""A whole training step as one CUDA graph: recorded once for each batch size, then replayed without Python."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from mdistiller_norm.engine.teacher import Raw


class Step(Protocol):
    """What can be captured: a function of tensors that writes to tensors which stay where they are."""

    def __call__(self, *raw: Tensor) -> None:
        """Train on the batch that ``raw`` names."""

    def held(self) -> list[Tensor]:
        """Every tensor that it writes to."""


class CapturedStep:
    """A training step whose work is replayed from CUDA graphs.

    The inputs of a step are copied into static buffers; everything else it touches (weights, momenta, metrics, the
    learning rate, the factors) stays at one address and is written in place. Before the recording the step is run a few
    times on a side stream, as capturing requires, and what that changed is put back.

    Args:
        step: the eager step.
    """

    WARMUP = 3

    def __init__(self, step: Step) -> None:
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

    def _record(self, raw: Raw) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        inputs = [tensor.clone() for tensor in raw]
        state = self.step.held()
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
