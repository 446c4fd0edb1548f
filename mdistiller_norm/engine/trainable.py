"""The one module that trains: the student and the distillers' own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdistiller_norm.distillers.base import Distiller, Need, at_least_float32
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Batch, Losses, Outputs


class Trainable(nn.Module):
    """Student and distillers; what the optimizer, DistributedDataParallel and checkpoints see. No teacher inside.

    Args:
        student: the network to train.
        distillers: by name; none for plain training. Their losses add up, cross entropy counts once.
        ce_weight: weight of the cross entropy.
        autocast: the dtype of the student's pass, None for float32. Losses are in at least float32 all the same.

    Attributes:
        passes: from images to the student's outputs: ``student.outputs``, or a compiled form of it.
    """

    def __init__(
        self,
        student: Network,
        distillers: Mapping[str, Distiller] | None = None,
        ce_weight: float = 1.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.passes: Callable[[Tensor], Outputs] = student.outputs
        self.distillers = nn.ModuleDict(dict(distillers or {}))
        self.ce_weight = ce_weight
        self.autocast = autocast

    @property
    def loss_names(self) -> list[str]:
        """What ``Losses.parts`` holds, in order."""
        return ["ce", *self.distillers]

    def methods(self) -> list[Distiller]:
        """The distillers, in the order of ``loss_names``."""
        return [method for method in self.distillers.values() if isinstance(method, Distiller)]

    @property
    def need(self) -> Need:
        """The most that any of the distillers reads of the teacher."""
        return max((method.need for method in self.methods()), default=Need.NOTHING)

    def factors(self, epoch: int) -> list[float]:
        """What each part is multiplied by in this epoch (counted from 1): its weight times its warm-up ramp."""
        return [self.ce_weight, *(method.weight * method.ramp(epoch) for method in self.methods())]

    def forward(self, batch: Batch, teacher: Outputs | None, factors: Tensor) -> Losses:
        """One pass of the student and all losses.

        Args:
            batch: what the student sees.
            teacher: the teacher's outputs for it; None for plain training.
            factors: ``[1 + distillers]``, see :meth:`factors`.
        """
        return self.losses(self.student_outputs(batch.images), batch, teacher, factors)

    def student_outputs(self, images: Tensor) -> Outputs:
        """What the student says of images ``[B, 3, H, W]``, in the precision it is trained in."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return self.passes(images)

    def losses(self, student: Outputs, batch: Batch, teacher: Outputs | None, factors: Tensor) -> Losses:
        """All losses of what the student said.

        Args:
            student: its outputs for the batch.
            batch: see :meth:`forward`, as the next two.
            teacher: the teacher's outputs.
            factors: ``[1 + distillers]``.

        Raises:
            ConfigError: a method gives something else than a scalar, or one without a gradient.
        """
        logits = at_least_float32(student.logits)
        weighted = torch.stack(self.parts(student._replace(logits=logits), batch, teacher)) * factors
        return Losses(weighted.sum(), weighted, logits.detach())

    def parts(self, student: Outputs, batch: Batch, teacher: Outputs | None) -> list[Tensor]:
        """The losses of ``loss_names``, not weighted, each a scalar: see :meth:`losses`."""
        with torch.autocast(batch.images.device.type, enabled=False):
            student = _at_least_float32(student, self.need)
            parts = [F.cross_entropy(student.logits, batch.targets)]
            if teacher is not None:
                teacher = _at_least_float32(teacher, self.need)
                for name, method in self.distillers.items():
                    parts.append(_usable(name, method(student, teacher, batch), parts[0]))
        return parts


def _usable(name: str, loss: object, cross_entropy: Tensor) -> Tensor:
    """A method's loss, refused where nothing could be learned from it."""
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(f"{name}: its forward gives {got}: it must give a scalar, a tensor of shape []")
    if cross_entropy.requires_grad and not loss.requires_grad:
        raise ConfigError(f"{name}: its loss has no gradient, so nothing would be learned: is something detached?")
    return loss


def _at_least_float32(outputs: Outputs, need: Need) -> Outputs:
    """The outputs for the losses; what none of them reads stays as it is: converting it takes time."""
    logits, features, preacts, pooled = outputs
    if need >= Need.POOLED:
        pooled = at_least_float32(pooled)
    if need >= Need.MAPS:
        features, preacts = (tuple(at_least_float32(each) for each in maps) for maps in (features, preacts))
    return Outputs(at_least_float32(logits), features, preacts, pooled)
