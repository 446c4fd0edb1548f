"""CUDA graphs of whole training steps and evaluation passes, recorded once for each shape of the inputs."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mdistiller_norm.data import EvalLoader
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.errors import first_line
from mdistiller_norm.models.base import Network

Warn = Callable[[str], None]
WARMUP = 3  # calls before recording


class Captured:
    """A function of tensors that replays CUDA graphs, which share their working memory.

    Inputs are copied into static buffers. Other tensors that the function reads (weights, the learning rate) must stay
    at one address. If recording fails, the function runs as it is. ``state_tensors`` returns the tensors that the
    function writes to.
    """

    def __init__(
        self, function: Callable[..., Any], warn: Warn, state_tensors: Callable[[], Any] = list
    ) -> None:
        self._function, self._state_tensors, self._warn = function, state_tensors, warn
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}
        self._pool: Any = None
        self._stream: Any = None  # PyTorch's default for captures belongs to one device
        self._failed = False

    def __call__(self, *inputs: Tensor) -> Any:
        """Copy the inputs into the graph's buffers and replay it. The next call overwrites the outputs."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs and not self._failed:
            try:
                # The contexts select the device's streams, and restore the current one if recording fails.
                device = torch.cuda.device_of(inputs[0])
                with device, torch.cuda.stream(torch.cuda.current_stream(inputs[0].device)):
                    self._graphs[shapes] = self._record(inputs)
            except RuntimeError as error:
                self._failed = True
                self._warn(f"warning: no CUDA graph, recording one failed ({first_line(error)})")
        if shapes not in self._graphs:
            return self._function(*inputs)
        graph, buffers, outputs = self._graphs[shapes]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        return outputs

    def _record(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        """Warm up on a side stream, as capturing requires, undo the changes of the warm-up, and record."""
        buffers = [tensor.clone() for tensor in inputs]
        state = self._state_tensors()
        before = [tensor.clone() for tensor in state]
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    self._function(*buffers)
        finally:
            torch.cuda.current_stream().wait_stream(stream)
            for tensor, saved in zip(state, before, strict=True):
                tensor.copy_(saved)
        gc.collect()  # destroying an old graph during the recording would break it
        graph = torch.cuda.CUDAGraph()
        # Other threads may synchronise meanwhile: the teacher cache's writer does.
        with torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            outputs = self._function(*buffers)
        self._pool = graph.pool()
        return graph, buffers, outputs


def capture_step(step: TrainStep, setting: str, log: Warn) -> Callable[..., None]:
    """Return the step as a CUDA graph if ``ENGINE.CUDA_GRAPH`` and the device allow it, else the step."""
    on_gpu = step.loss_weights.is_cuda
    if setting == "off" or (setting == "auto" and not on_gpu):
        return step
    slow = [name for name, method in step.trainable.distillers.items() if not method.capturable]
    reasons = {
        "there is no CUDA device": not on_gpu,
        f"{' and '.join(slow)} synchronises with the host in every step": bool(slow),
        "several processes exchange gradients": distributed.together(),
        "the images of this data set come from the host": not step.loader.on_device,
    }
    if any(reasons.values()):
        log(f"no CUDA graph: {next(reason for reason, applies in reasons.items() if applies)}")
        return step
    return Captured(step, log, step.state_tensors)


def capture_network(
    network: Network, test: EvalLoader, setting: str, log: Warn
) -> Callable[[Tensor], Tensor] | None:
    """Return the network as CUDA graphs for evaluation if the test images are on a GPU, else None."""
    on_gpu = next(network.parameters()).is_cuda and test.on_device
    return Captured(network, log) if on_gpu and setting != "off" else None
