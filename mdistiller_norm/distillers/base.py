"""Base class and registry of the distillation methods."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import FunctionType
from typing import Any, ClassVar, Self, TypeVar

from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import Registry
from mdistiller_norm.types import Batch, Outputs
from mdistiller_norm.types import at_least_float32 as at_least_float32


class Need(enum.IntEnum):
    """Network outputs that a method reads; each level includes the ones before it.

    Teacher outputs above the level are not computed or not cached. Student outputs above it are not converted to fp32.
    """

    NOTHING = 0
    LOGITS = 1
    POOLED = 2
    MAPS = 3


# Meanings of config keys by the last part of the key.
COMMON_MEANINGS = {
    "CE_WEIGHT": "weight of the cross entropy",
    "KD_WEIGHT": "weight of the distillation loss",
    "FEAT_WEIGHT": "weight of the distillation loss",
    "WARMUP": "epochs of the linear warm-up of the distillation loss; 0: none",
    "TEMPERATURE": "temperature of both networks",
    "T": "temperature of both networks",
    "INPUT_SIZE": "not used",
}


@dataclass(frozen=True)
class Pair:
    """Shapes and data that a method can use to build its modules; neither network has run.

    Attributes:
        student: outputs of the student as meta tensors for a batch of 2.
        teacher: outputs of the teacher, likewise.
        teacher_network: the teacher in eval mode, for reading its weights (OFD's margins).
        targets: ``[N]`` int64, class of every training sample (CRD's negatives).
        num_classes: number of classes C.
    """

    student: Outputs
    teacher: Outputs
    teacher_network: nn.Module
    targets: Tensor
    num_classes: int


class Distiller(nn.Module):
    """Base class of the distillation methods: a module around a pure loss function.

    The cross entropy, the weight and the warm-up are applied outside, once for all methods:
    ``total = ce_weight * CE + min(epoch / warmup, 1) * weight * distiller(student, teacher, batch)``.

    Attributes:
        defaults: config node of the method with its default values (mdistiller's names).
        meanings: of the keys in ``defaults``; those in :data:`COMMON_MEANINGS` may be left out.
        arguments: key of the node for each keyword argument of the loss, read into ``settings``.
        loss: static function that the classes below call with ``settings``.
        need: network outputs that the method reads.
        capturable: whether a step can be captured in a CUDA graph; False if it synchronises with the host.
        needs_indices: whether ``Batch.indices`` must be known.
        needs_labels: whether each image needs one class, which mixed images lack; set where the method is registered.
        teacher_in_train_mode: run the teacher with batch statistics, as OFD's authors do.
        ce_weight: weight of the cross entropy.
        weight: weight of the distillation loss.
        warmup: number of epochs of the linear warm-up of the distillation loss; 0 or 1 for none.
        settings: keyword arguments of the loss.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    meanings: ClassVar[dict[str, str]] = {}
    arguments: ClassVar[dict[str, str]] = {}
    loss: ClassVar[Callable[..., Tensor]]
    need: ClassVar[Need] = Need.LOGITS
    capturable: ClassVar[bool] = True
    needs_indices: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    teacher_in_train_mode: bool = False

    def __init__(
        self, *, ce_weight: float = 1.0, weight: float = 1.0, warmup: int = 0, **settings: Any
    ) -> None:
        super().__init__()
        self.ce_weight, self.weight = float(ce_weight), float(weight)
        self.warmup, self.settings = int(warmup), settings

    @classmethod
    def from_config(cls, node: Any, pair: Pair) -> Self:
        """Build the method from its config node and the shapes of the two networks.

        The default passes the loss weights and ``arguments``; override it for methods with modules of their own.

        Raises:
            ConfigError: a value is invalid, or the method does not support this pair.
        """
        settings = {name: attrgetter(key)(node) for name, key in cls.arguments.items()}
        return cls(**settings, **loss_weights(node))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Compute the unweighted distillation loss, a scalar in float32 or float64."""
        raise ConfigError(f"{type(self).__name__} requires a forward method")

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """Update in place the buffers that depend on the epoch (counted from 1); called before every epoch."""

    def extra_parameters(self) -> int:
        """Return the number of parameters that the method adds, counted as in Table 9 of the NormKD paper."""
        return sum(parameter.numel() for parameter in self.parameters())

    def ramp(self, epoch: int) -> float:
        """Return the factor of the linear warm-up in this epoch (counted from 1)."""
        return min(epoch / self.warmup, 1.0) if self.warmup > 1 else 1.0


class LogitDistiller(Distiller):
    """Method whose ``loss`` reads the logits ``[B, C]`` of student and teacher."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.loss(student.logits, teacher.logits, **self.settings)


class TargetDistiller(Distiller):
    """Method whose ``loss`` reads the logits ``[B, C]`` of student and teacher and the targets ``[B]``."""

    needs_labels = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.loss(student.logits, teacher.logits, batch.targets, **self.settings)


class PooledDistiller(Distiller):
    """Method whose ``loss`` reads the pooled features ``[B, D]`` of student and teacher."""

    need = Need.POOLED

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return self.loss(student.pooled, teacher.pooled, **self.settings)


DISTILLERS: Registry[type[Distiller]] = Registry("distiller")

D = TypeVar("D", bound=type[Distiller])
_READS = {"features": Need.MAPS, "preacts": Need.MAPS, "pooled": Need.POOLED}  # fields of Outputs
_WEIGHTS = {
    "CE_WEIGHT": "ce_weight",
    "FEAT_WEIGHT": "weight",
    "KD_WEIGHT": "weight",
    "REVIEWKD_WEIGHT": "weight",
    "WARMUP": "warmup",
    "WARMUP_EPOCHS": "warmup",
}


def register(name: str) -> Callable[[D], D]:
    """Register a distiller under its ``DISTILLER.TYPE``, which is also the name of its config node (decorator)."""

    def add(cls: D) -> D:
        if not (isinstance(cls, type) and issubclass(cls, Distiller)):
            raise TypeError(f"distiller {name!r} must be a subclass of Distiller")
        functions = [value for value in vars(cls).values() if isinstance(value, FunctionType)]
        read = {name for function in functions for name in function.__code__.co_names}
        for key, need in _READS.items():
            if key in read and cls.need < need:
                raise TypeError(f"{name} reads {key}: add `need = distillers.Need.{need.name}`")
        cls.needs_labels = cls.needs_labels or not {"targets", "indices"}.isdisjoint(read)
        DISTILLERS.register(name)(cls)
        return cls

    return add


def build_distiller(name: str, cfg: Any, pair: Pair) -> Distiller:
    """Build a registered method from its node in a config."""
    try:
        method: object = DISTILLERS[name].from_config(cfg.get(name, CfgNode()), pair)
    except ConfigError as error:
        raise error if str(error).startswith(name) else ConfigError(f"{name}: {error}") from error
    if not isinstance(method, Distiller):
        raise ConfigError(f"{name}: from_config must return a Distiller, got {type(method)}")
    return method


def loss_weights(node: Any) -> dict[str, Any]:
    """Return the arguments ``ce_weight``, ``weight`` and ``warmup`` of :class:`Distiller` from a config node.

    They are ``CE_WEIGHT``, ``KD_WEIGHT`` or ``FEAT_WEIGHT``, and ``WARMUP``, or mdistiller's other names of them, in
    the node or its section ``LOSS``.

    Raises:
        ConfigError: a number of the node is negative.
    """
    values = {**node, **node.get("LOSS", {})}
    for key, value in values.items():
        if isinstance(value, (int, float)) and value < 0:
            raise ConfigError(f"{key} must be >= 0, got {value}")
    return {argument: values[key] for key, argument in _WEIGHTS.items() if key in values}
