"""What several feature methods share: which map meets which, and shapes a config file may still name.

The rule: the first map is the stem and is left out, the last stage of the student meets the last stage of the teacher,
and so on towards the shallow end; where one network has more stages, its shallowest are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.distillers.base import at_least_float32
from mdistiller_norm.errors import ConfigError

Maps = tuple[Tensor, ...]


def matched_stages(student: Maps, teacher: Maps) -> tuple[Maps, Maps]:
    """The stages of both networks that meet, shallow to deep, equally many.

    Args:
        student: maps ``[B, D_i, H_i, W_i]``, the stem first.
        teacher: likewise.

    Raises:
        ConfigError: one of the networks has no stage besides its stem.
    """
    count = min(len(student), len(teacher)) - 1
    if count < 1:
        raise ConfigError(
            f"no stages to match: student maps are {shapes(student)}, teacher maps {shapes(teacher)}, and the first "
            "map of each is left out as its stem"
        )
    return student[-count:], teacher[-count:]


def require_preacts(**networks: Maps) -> None:
    """Refuse networks that show no maps from before an activation, given by what they are in the pair.

    Raises:
        ConfigError: names the first of them.
    """
    for role, preacts in networks.items():
        if not preacts:
            raise ConfigError(
                f"it reads maps from before their ReLU, and the {role} shows none: a wrapped network has to give them "
                "as preacts; else choose another method"
            )


def pool_to(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Average ``[B, D, H, W]`` over equal windows down to ``size`` (adaptive pooling where it does not divide).

    In at least float32: averages in half precision would be rounded.
    """
    maps = at_least_float32(maps)
    (height, width), (rows, columns) = maps.shape[-2:], size
    if (height, width) == (rows, columns):
        return maps
    if height % rows or width % columns:
        return F.adaptive_avg_pool2d(maps, (rows, columns))
    # Equal to adaptive pooling, and its backward pass on CUDA is deterministic.
    return F.avg_pool2d(maps, (height // rows, width // columns))


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps ``[B, D, H, W]`` at the smaller height and the smaller width, see :func:`pool_to`."""
    size = [min(sides) for sides in zip(student.shape[-2:], teacher.shape[-2:], strict=True)]
    return pool_to(student, size), pool_to(teacher, size)


def shape(tensor: Tensor) -> str:
    """The shape of one sample, for messages: "64x32x32"."""
    return "x".join(str(size) for size in tensor.shape[1:])


def shapes(tensors: Maps) -> str:
    """The shapes of several, for messages."""
    return ", ".join(shape(tensor) for tensor in tensors) or "none"


def check_typed(key: str, typed: object, default: object, probed: object) -> None:
    """Refuse a shape in a config that the networks contradict.

    mdistiller's files type shapes that are probed here. Its defaults fit one pair only and reach every pair, so a value
    equal to the default says nothing.

    Raises:
        ConfigError: the value is neither the default nor the probed one.
    """
    typed = list(typed) if isinstance(typed, (list, tuple)) else typed
    if typed not in (default, probed):
        raise ConfigError(f"{key} is {typed}, but the networks of this pair have {probed}: correct it or leave it out")
