"""The one module that trains: the student and the distillers' parameters."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mdistiller_norm.distillers.base import Distiller, Need
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Batch, Losses, Outputs, at_least_float32


class Trainable(nn.Module):
    """Student and distillers: the module that the optimizer, DistributedDataParallel and checkpoints see.

    Args:
        distillers: by name; none for plain training. Their losses are summed, with one cross entropy.
        autocast: dtype of the student's forward pass, None for float32. Losses are computed in at least float32.
        ema: decay of an exponential moving average of the student's weights; 0 for none.

    Attributes:
        ema: the student with averaged weights, or None.
        need: outputs that the distillers read.
        forward_student: maps images to the student's outputs: ``student.outputs`` or a compiled form of it.
    """

    def __init__(
        self,
        student: Network,
        distillers: Mapping[str, Distiller] | None = None,
        autocast: torch.dtype | None = None,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.autocast = student, autocast
        self.forward_student: Callable[[Tensor], Outputs] = student.outputs
        self.distillers = nn.ModuleDict(dict(distillers or {}))
        self.methods = list((distillers or {}).values())
        self.loss_names = ["ce", *self.distillers]
        self.need = max((method.need for method in self.methods), default=Need.NOTHING)
        self.label_smoothing = label_smoothing
        self.ema = copy.deepcopy(student).requires_grad_(False) if ema else None
        self._decay = ema

    @property
    def evaluated(self) -> Network:
        """The network to evaluate and save: the student, or its average."""
        return self.student if self.ema is None else self.ema

    def update_average(self) -> None:
        if self.ema is not None:
            states = (net.state_dict(keep_vars=True) for net in (self.ema, self.student))
            averages, values = (
                # Each tied tensor once.
                [*filter(torch.is_floating_point, dict.fromkeys(state.values()))]
                for state in states
            )
            get_ema_multi_avg_fn(self._decay)(averages, values, None)

    def loss_weights(self, epoch: int) -> list[float]:
        """Return the weight of each loss in this epoch (counted from 1), with the warm-up ramp applied."""
        cross_entropy = max((method.ce_weight for method in self.methods), default=1.0)
        return [cross_entropy, *(method.weight * method.ramp(epoch) for method in self.methods)]

    def forward(self, batch: Batch, teacher: Outputs | None, loss_weights: Tensor) -> Losses:
        """Run the student and compute all losses.

        Args:
            batch: images and targets: classes ``[B]`` or class probabilities ``[B, C]``.
            teacher: the teacher's outputs for the batch; None for plain training.
            loss_weights: ``[1 + distillers]``, see :meth:`loss_weights`.
        """
        student = self.student_outputs(batch.images)
        weighted = torch.stack(self.losses(student, batch, teacher)) * loss_weights
        return Losses(weighted.sum(), weighted, at_least_float32(student.logits.detach()))

    def student_outputs(self, images: Tensor) -> Outputs:
        with torch.autocast(images.device.type, self.autocast, enabled=bool(self.autocast)):
            return self.forward_student(images)

    def losses(self, student: Outputs, batch: Batch, teacher: Outputs | None) -> list[Tensor]:
        """Return the unweighted losses in the order of ``loss_names``, each a scalar."""
        with torch.autocast(batch.images.device.type, enabled=False):
            student = _at_least_float32(student, self.need)
            smoothing = self.label_smoothing
            losses = [F.cross_entropy(student.logits, batch.targets, label_smoothing=smoothing)]
            if teacher is not None:
                teacher = _at_least_float32(teacher, self.need)
                for name, method in self.distillers.items():
                    loss = method(student, teacher, batch)
                    if not isinstance(loss, Tensor) or loss.dim():
                        got = getattr(loss, "shape", type(loss).__name__)
                        raise ConfigError(
                            f"{name}: forward must return a scalar tensor, got {got}"
                        )
                    if losses[0].requires_grad and not loss.requires_grad:
                        raise ConfigError(f"{name}: the loss must have a gradient")
                    losses.append(loss)
        return losses


def _at_least_float32(outputs: Outputs, need: Need) -> Outputs:
    logits, features, preacts, pooled = outputs
    if need >= Need.POOLED:
        pooled = at_least_float32(pooled)
    if need >= Need.MAPS:
        features, preacts = (tuple(map(at_least_float32, maps)) for maps in (features, preacts))
    return Outputs(at_least_float32(logits), features, preacts, pooled)
