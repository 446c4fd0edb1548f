"""The one module that trains: the student and the distillers' parameters."""

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
    """Student and distillers: the module that the optimizer, DistributedDataParallel and checkpoints see.

    Args:
        student: the network to train.
        distillers: by name; none for plain training. Their losses are summed, with one cross entropy.
        ce_weight: weight of the cross entropy.
        autocast: dtype of the student's forward pass, None for float32. Losses are computed in at least float32.

    Attributes:
        forward_student: maps images to the student's outputs: ``student.outputs`` or a compiled form of it.
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
        self.forward_student: Callable[[Tensor], Outputs] = student.outputs
        self.distillers = nn.ModuleDict(dict(distillers or {}))
        self.ce_weight = ce_weight
        self.autocast = autocast

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses, in the order of ``Losses.parts``."""
        return ["ce", *self.distillers]

    def methods(self) -> list[Distiller]:
        """Return the distillers in the order of ``loss_names``."""
        return [method for method in self.distillers.values() if isinstance(method, Distiller)]

    @property
    def need(self) -> Need:
        """The teacher's outputs that the distillers read."""
        return max((method.need for method in self.methods()), default=Need.NOTHING)

    def loss_weights(self, epoch: int) -> list[float]:
        """Return the weight of each loss in this epoch (counted from 1), with the warm-up ramp applied."""
        return [self.ce_weight, *(method.weight * method.ramp(epoch) for method in self.methods())]

    def forward(self, batch: Batch, teacher: Outputs | None, loss_weights: Tensor) -> Losses:
        """Run the student and compute all losses.

        Args:
            batch: augmented images and targets: classes ``[B]`` or class probabilities ``[B, C]``.
            teacher: the teacher's outputs for the batch; None for plain training.
            loss_weights: ``[1 + distillers]``, see :meth:`loss_weights`.
        """
        student = self.student_outputs(batch.images)
        weighted = torch.stack(self.losses(student, batch, teacher)) * loss_weights
        return Losses(weighted.sum(), weighted, at_least_float32(student.logits.detach()))

    def student_outputs(self, images: Tensor) -> Outputs:
        """Run the student on images ``[B, 3, H, W]`` in the precision of training."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return self.forward_student(images)

    def losses(self, student: Outputs, batch: Batch, teacher: Outputs | None) -> list[Tensor]:
        """Return the unweighted losses in the order of ``loss_names``, each a scalar.

        Raises:
            ConfigError: a distiller returns no scalar, or one without a gradient.
        """
        with torch.autocast(batch.images.device.type, enabled=False):
            student = _at_least_float32(student, self.need)
            losses = [F.cross_entropy(student.logits, batch.targets)]
            if teacher is not None:
                teacher = _at_least_float32(teacher, self.need)
                for name, method in self.distillers.items():
                    loss = method(student, teacher, batch)
                    _check_loss(name, loss, losses[0].requires_grad)
                    losses.append(loss)
        return losses


def _check_loss(name: str, loss: object, differentiable: bool) -> None:
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(f"{name}: forward must return a scalar tensor (of shape []), got {got}")
    if differentiable and not loss.requires_grad:
        raise ConfigError(f"{name}: the loss must have a gradient: is something detached?")


def _at_least_float32(outputs: Outputs, need: Need) -> Outputs:
    """Convert the outputs that the losses read."""
    logits, features, preacts, pooled = outputs
    if need >= Need.POOLED:
        pooled = at_least_float32(pooled)
    if need >= Need.MAPS:
        features, preacts = (tuple(map(at_least_float32, maps)) for maps in (features, preacts))
    return Outputs(at_least_float32(logits), features, preacts, pooled)
