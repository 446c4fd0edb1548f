"""Helpers of several methods: matching maps by stage, unit vectors, keyed random integers."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, Pair
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.types import Batch, Outputs, at_least_float32

Maps = tuple[Tensor, ...]


def match_stages(student: Maps, teacher: Maps) -> tuple[Maps, Maps]:
    """Match the stages of two networks from the deepest to the shallowest; return equally many, shallow to deep.

    The first map of each network, the stem, is not used. If one network has more stages, its shallowest are not used.

    Args:
        student, teacher: maps ``[B, D_i, H_i, W_i]``, shallow to deep.

    Raises:
        ConfigError: a network has no stages.
    """
    count = min(len(student), len(teacher)) - 1
    if count < 1:
        raise ConfigError(
            f"requires stems and stages, got {shapes(student)} and {shapes(teacher)}"
        )
    return student[-count:], teacher[-count:]


class StageDistiller(Distiller):
    """Method whose ``loss`` reads the maps of matched stages of student and teacher."""

    need = Need.MAPS

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        match_stages(pair.student.features, pair.teacher.features)  # checks them
        return super().from_config(node, pair)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.loss(*match_stages(student.features, teacher.features), **self.settings)


def need_preacts(role: str, preacts: Maps) -> None:
    """Raise a ConfigError if a network has no pre-activations."""
    if not preacts:
        raise ConfigError(f"requires maps before their ReLU: choose another {role} or method")


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses its running statistics for a single value per channel, which PyTorch's refuses."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def pool_to(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average ``[B, D, H, W]`` down to ``size`` (adaptive average pooling), in at least float32."""
    maps = at_least_float32(maps)
    (height, width), (rows, columns) = maps.shape[-2:], size
    if (height, width) == (rows, columns):
        return maps
    if height % rows or width % columns:
        return F.adaptive_avg_pool2d(maps, (rows, columns))
    # Equal to adaptive pooling, but with a deterministic backward pass on CUDA.
    return F.avg_pool2d(maps, (height // rows, width // columns))


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps ``[B, D, H, W]`` to the smaller height and the smaller width."""
    size = [min(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return pool_to(student, size), pool_to(teacher, size)


def shapes(tensors: Sequence[Tensor]) -> str:
    """Format the shapes of tensors without the batch: ``64x32x32, 128x16x16``."""
    return ", ".join("x".join(map(str, tensor.shape[1:])) for tensor in tensors) or "none"


def check_typed(key: str, value: object, default: object, probed: object) -> None:
    """Raise a ConfigError if a shape in the config differs from the networks' and is not the default.

    mdistiller's configs contain shapes that are probed here. Its defaults fit one pair only, so they are ignored.
    """
    if value not in (default, probed):
        raise ConfigError(f"{key} must be {probed} for this pair, got {value}: leave it out")


def unit(x: Tensor, dim: int) -> Tensor:
    """Divide by the Euclidean norm along ``dim``, in at least float32, without overflow or underflow of the squares.

    A zero vector stays zero and gets no gradient.
    """
    x = at_least_float32(x)
    peak = x.detach().abs().amax(dim, keepdim=True)
    zero = peak == 0
    x = x / peak.masked_fill(zero, 1)
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(zero, torch.inf)


# SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014). Its n-th number is a
# bijective mix of key + n * GAMMA, so the numbers of a key are distinct. Signed constants; arithmetic wraps around.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def _shift(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * FIRST
    bits = (bits ^ _shift(bits, 27)) * SECOND
    return bits ^ _shift(bits, 31)


def keyed_integers(key: Tensor, counters: Tensor) -> Tensor:
    """Return uniform random int64 numbers of the shape of ``counters``, positions in the stream of the scalar ``key``.

    They depend on nothing else, and distinct counters give distinct numbers.
    """
    return _mix(_mix(key) + counters * GAMMA)


def keyed_below(key: Tensor, counters: Tensor, bound: Tensor) -> Tensor:
    """Return :func:`keyed_integers` reduced to ``[0, bound)`` (uniform up to ``bound / 2 ** 63``)."""
    return _shift(keyed_integers(key, counters), 1) % bound
