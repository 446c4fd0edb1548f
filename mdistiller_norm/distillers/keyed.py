"""Random integers that are a pure function of a key: no generator, no state, the same on every device.

Source: Steele et al., "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014): SplitMix64, whose n-th number is
a bijective mix of ``key + n * GAMMA``, so one key never gives the same number twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants of SplitMix64, written as signed integers; arithmetic wraps around.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical shift right: the sign bit does not come along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * FIRST
    bits = (bits ^ _shift(bits, 27)) * SECOND
    return bits ^ _shift(bits, 31)


def keyed_integers(key: Tensor, counters: Tensor) -> Tensor:
    """The numbers of a key's stream at these places.

    Args:
        key: int64 scalar; neighbouring keys give unrelated streams.
        counters: int64, any shape.

    Returns:
        Shape of ``counters``: int64, uniform over all values, distinct where the counters are.
    """
    return _mix(_mix(key) + counters * GAMMA)


def keyed_below(key: Tensor, counters: Tensor, bound: Tensor) -> Tensor:
    """As :func:`keyed_integers`, but in ``[0, bound)`` (uniform up to ``bound / 2 ** 63``)."""
    return _shift(keyed_integers(key, counters), 1) % bound


def keyed_permutation(key: Tensor, count: int) -> Tensor:
    """``[count]`` int64, a random order of ``0 .. count - 1``; reads the first ``count`` places of the stream."""
    return keyed_integers(key, torch.arange(count, device=key.device)).argsort()
