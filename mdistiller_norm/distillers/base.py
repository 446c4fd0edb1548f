"""What every distillation method is: two networks' outputs and a batch in, one loss out."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Batch, Outputs


class Need(enum.IntEnum):
    """How much of the networks' outputs a method reads.

    What no method needs of the teacher is not computed, or may be cached; what none needs of the student stays in the
    precision of its pass.
    """

    NOTHING = 0
    LOGITS = 1
    POOLED = 2
    MAPS = 3


@dataclass(frozen=True)
class Pair:
    """What a method may learn of its two networks before training, found without running either.

    Attributes:
        student: the student's outputs as meta tensors of batch size 2: shapes without values.
        teacher: the teacher's, likewise.
        teacher_network: the teacher in eval mode, to read weights from (OFD's margins); never to run or change.
        targets: ``[N]`` int64, the class of every training sample (CRD's negatives).
        num_classes: number of classes C.
    """

    student: Outputs
    teacher: Outputs
    teacher_network: nn.Module
    targets: Tensor
    num_classes: int


class Distiller(nn.Module):
    """A distillation method: the thin class around a pure loss function.

    Cross entropy, ``weight`` and the warm-up ramp are applied outside, once for all methods:
    ``total = ce_weight * CE + min(epoch / warmup, 1) * weight * distiller(student, teacher, batch)``.

    Attributes:
        defaults: the method's config node with its default values (mdistiller's names).
        need: what it reads of the two networks.
        ce_weight: weight of the cross entropy.
        weight: weight of the distillation loss.
        teacher_in_train_mode: run the teacher with batch statistics, as OFD's reference does.
        capturable: whether a step can be recorded as a CUDA graph; not where it waits for the host.
        warmup: epochs over which the distillation loss is ramped up linearly, counted from 1; 0 or 1 for none.

    Raises:
        ConfigError: a weight or the warm-up is negative.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    need: ClassVar[Need] = Need.LOGITS
    capturable: ClassVar[bool] = True
    teacher_in_train_mode: bool = False

    def __init__(self, *, ce_weight: float = 1.0, weight: float = 1.0, warmup: int = 0) -> None:
        super().__init__()
        if min(ce_weight, weight, warmup) < 0:
            raise ConfigError(
                f"the weight of the cross entropy ({ce_weight}), that of the method's loss "
                f"({weight}) and the epochs of warm-up ({warmup}) must be zero or positive"
            )
        self.ce_weight = float(ce_weight)
        self.weight = float(weight)
        self.warmup = int(warmup)

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Distiller:
        """Build the method from its config node and the probed pair of networks.

        Raises:
            ConfigError: a value that makes no sense, or a pair that cannot work (names both shapes).
        """
        raise ConfigError(f"{cls.__name__} does not say how it is built: it needs a from_config")

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The distillation loss, a scalar, unweighted; float32 or float64."""
        raise ConfigError(f"{type(self).__name__} does not say what its loss is: it needs a forward")

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """Called before every epoch (counted from 1): write what changes with it into buffers, in place."""

    def extra_parameters(self) -> int:
        """Number of parameters the method adds, as Table 9 counts them (CRD adds its memory)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def ramp(self, epoch: int) -> float:
        """Factor of the distillation loss in this epoch, counted from 1 (mdistiller's linear warm-up)."""
        return min(epoch / self.warmup, 1.0) if self.warmup > 1 else 1.0


DISTILLERS: Registry[type[Distiller]] = Registry("distiller")

D = TypeVar("D", bound=type[Distiller])


def register(name: str) -> Callable[[D], D]:
    """Class decorator: file a distiller under its ``DISTILLER.TYPE``, which is the name of its config node too."""

    def add(cls: D) -> D:
        if not (isinstance(cls, type) and issubclass(cls, Distiller)):
            raise TypeError(f"distiller {name!r} must be a subclass of Distiller")
        DISTILLERS.register(name)(cls)
        return cls

    return add


def refuse_negative(**values: float) -> None:
    """Refuse hyper-parameters below zero, given by the names of their config keys.

    Raises:
        ConfigError: names the first of them.
    """
    for key, value in values.items():
        if value < 0:
            raise ConfigError(f"{key} is {value:g}: it must be zero or positive")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
