"""Times, their spread, and taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Record = dict[str, Any]
T = TypeVar("T")


def spread(values: Sequence[float]) -> Record:
    """Median, quartiles (of the values as a whole population), their number, and the values themselves."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values), "values": list(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> Record:
    """The spread of the quotients of values of the same round."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def take_turns(contestants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call everyone once a round, in an order that is reversed from round to round.

    Returns:
        What each of them returned, by round.
    """
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            results[name].append(contestants[name]())
    return results


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, after everything that the device was asked to do."""
    wait_for(device)
    return time.perf_counter()


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of the best of ten square matrix products: what the arithmetic of this machine gives at most.

    On CUDA, float32 products may use TF32 here if convolutions may.
    """
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    best = float("inf")
    for _ in range(10):
        start = clock(device)
        torch.mm(a, b)
        best = min(best, clock(device) - start)
    torch.set_float32_matmul_precision(precision)
    return 2 * size**3 / best / 1e9
