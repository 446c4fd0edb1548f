"""Whole training steps, and passes of evaluation, as CUDA graphs: recorded once for each batch size, then replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mdistiller_norm.data.base import Warn
from mdistiller_norm.engine.teacher import Raw
from mdistiller_norm.errors import first_line


class Step(Protocol):
    """What can be captured: a function of tensors that writes to tensors which stay where they are."""

    def __call__(self, *raw: Tensor) -> None:
        """Train on the batch that ``raw`` names."""

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that it writes to."""


class _Recorder:
    """Graphs of a function by the shapes of its inputs; all of them share their working memory.

    Args:
        function: of tensors. What it reads besides its inputs must stay at one address.
        held: every tensor that it writes to and that outlives it.
        warn: is told, in a line, why it cannot be recorded. From then on it runs as it is.
    """

    WARMUP = 3

    def __init__(self, function: Callable[..., Any], held: Callable[[], list[Tensor]], warn: Warn) -> None:
        self.function, self.state_tensors, self.warn = function, held, warn
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._pool: Any = None
        self._refused = False

    def __call__(self, *inputs: Tensor) -> Any:
        """What the function gives; a recorded one writes it into the same tensors at every call."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs and not self._refused:
            try:
                # Whose streams are taken; and the current one comes back: a recording that fails leaves its own.
                device = torch.cuda.device_of(inputs[0])  # type: ignore[no-untyped-call]
                with device, torch.cuda.stream(torch.cuda.current_stream(inputs[0].device)):
                    self._graphs[shapes] = self._record(inputs)
            except RuntimeError as error:
                self._refused = True
                self.warn(f"warning: no CUDA graph, recording one failed ({first_line(error)})")
        if shapes not in self._graphs:
            return self.function(*inputs)
        graph, static, outputs = self._graphs[shapes]
        for buffer, tensor in zip(static, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        return outputs

    def _record(self, inputs: Raw) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        """Run it a few times on a side stream, as capturing requires, put back what that changed, and record it."""
        static = [tensor.clone() for tensor in inputs]
        state = self.state_tensors()
        before = [tensor.detach().clone() for tensor in state]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(self.WARMUP):
                    self.function(*static)
        finally:  # if one of these runs fails, too: nothing of them may stay
            torch.cuda.current_stream().wait_stream(stream)
            with torch.no_grad():
                for tensor, saved in zip(state, before, strict=True):
                    tensor.copy_(saved)
        # A graph of an earlier run that waits to be collected must not be destroyed in the middle of a recording.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        # Other threads may wait for the device meanwhile: the teacher cache's writer does.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self.function(*static)
        self._pool = graph.pool()
        return graph, static, outputs


class CapturedStep:
    """A training step whose work is replayed from CUDA graphs.

    The inputs of a step are copied into static buffers; everything else it touches (weights, momenta, metrics, the
    learning rate, the factors) stays at one address and is written in place.

    Args:
        step: the eager step.
        warn: is told, in a line, if it cannot be recorded.
    """

    def __init__(self, step: Step, warn: Warn = print) -> None:
        self.step = step
        self._run = _Recorder(step, step.state_tensors, warn)

    def __call__(self, *raw: Tensor) -> None:
        """Train on the batch that ``raw`` names."""
        self._run(*raw)


class CapturedNetwork:
    """A network's logits for evaluation, replayed from CUDA graphs; the weights may change in place between calls.

    Args:
        network: in eval mode whenever this is called.
        warn: is told, in a line, if it cannot be recorded.
    """

    def __init__(self, network: nn.Module, warn: Warn = print) -> None:
        self._run = _Recorder(network, lambda: [], warn)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, C]`` of images, in a tensor that the next call overwrites."""
        logits: Tensor = self._run(images)
        return logits
