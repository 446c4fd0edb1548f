"""Optimizers and the schedule of the learning rate."""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.types import Batch


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each epoch, counted from 1: a linear warm-up, then steps or a cosine."""

    kind: str  # step, or cosine: half a period, to zero after the last epoch
    lr: float  # after the warm-up
    epochs: int
    warmup: int  # epochs
    stages: Sequence[int]  # epochs after which decay multiplies the rate
    decay: float

    def __call__(self, epoch: int) -> float:
        if epoch <= self.warmup:
            return self.lr * epoch / (self.warmup + 1)
        if self.kind == "cosine":
            done = (epoch - 1 - self.warmup) / (self.epochs - self.warmup)
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr * self.decay ** sum(epoch > stage for stage in self.stages)


def build_fused(
    kind: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, **sgd: Any
) -> Optimizer:
    """Build fused AdamW, or SGD with ``momentum`` and ``nesterov``, with weight decay on every parameter.

    It has the state of its first step, so that a CUDA graph can record any step. On CUDA, the learning rate is a
    tensor that replayed graphs read.
    """
    trained = [p for p in parameters if p.requires_grad]
    device, on_gpu = trained[0].device, trained[0].is_cuda
    rate = torch.tensor(lr, device=device) if on_gpu else lr
    options: dict[str, Any] = {"weight_decay": weight_decay, "fused": True, "lr": rate}
    if kind == "AdamW":
        # Eager steps warn.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        optimizer: Optimizer = AdamW(trained, capturable=on_gpu, **options)
        averages = ["exp_avg", "exp_avg_sq"]
    else:
        optimizer = SGD(trained, **sgd, **options)
        averages = ["momentum_buffer"] if sgd["momentum"] else []
    for parameter in trained:
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in averages}
        if kind == "AdamW":
            optimizer.state[parameter]["step"] = torch.zeros((), device=device)
    return optimizer


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of every parameter group, in place where it is a tensor."""
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class DOT:
    """DOT: two SGD optimizers over the same parameters, for the gradients of the task and of the distillation.

    Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (ICCV 2023). The momentum of the task's gradient is
    lowered by Delta and that of the distillation's is raised by it, so that distillation dominates early training. As
    in the authors' code, weight decay belongs to the task's gradient, and parameters that only one loss reaches keep
    the usual momentum. With ``v_task = (mu - delta) v_task + g_task`` and ``v_kd = (mu + delta) v_kd + g_kd``, two
    SGD steps in a row compute ``theta - lr * (v_task + v_kd)``.

    A copy of ``trainable`` runs once, on any ``batch``, to find the parameters that each loss reaches.
    """

    def __init__(
        self, trainable: Trainable, batch: Batch, teacher: Teacher, delta: float, **sgd: Any
    ) -> None:
        momentum, weight_decay = sgd.pop("momentum"), sgd.pop("weight_decay")
        trial = copy.deepcopy(trainable)
        with torch.no_grad():
            teacher_outputs = teacher.network.outputs(batch.images)
        # Not Losses.parts: the gradient of an item of a stacked tensor is zero, not None, for the other items.
        outputs = trial.student_outputs(batch.images)
        cross_entropy, *methods = trial.losses(outputs, batch, teacher_outputs)
        copies, parameters = (
            [p for p in one.parameters() if p.requires_grad] for one in (trial, trainable)
        )
        task = torch.autograd.grad(cross_entropy, copies, retain_graph=True, allow_unused=True)
        distill = torch.autograd.grad(torch.stack(methods).sum(), copies, allow_unused=True)
        reached = [(a is not None, b is not None) for a, b in zip(task, distill, strict=True)]
        both, task_only, distill_only = (
            [p for p, by in zip(parameters, reached, strict=True) if by == wanted]
            for wanted in ((True, True), (True, False), (False, True))
        )
        self._task, self._distill = both + task_only, both + distill_only
        groups = (
            (both, momentum - delta, weight_decay),
            (both, momentum + delta, 0.0),
            (task_only, momentum, weight_decay),
            (distill_only, momentum, weight_decay),
        )
        self._optimizers = [
            build_fused("SGD", part, momentum=mu, weight_decay=decay, **sgd)
            for part, mu, decay in groups
            if part
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def backward(self, parts: Tensor) -> None:
        self._parts = parts

    def step(self) -> None:
        """Update the parameters from the losses of :meth:`backward`."""
        task = torch.autograd.grad(self._parts[0], self._task, retain_graph=True)
        distill = torch.autograd.grad(self._parts[1:].sum(), self._distill)
        del self._parts  # frees the graph
        by_task, by_distill, *others = self._optimizers
        updates = (by_task, self._task, task), (by_distill, self._distill, distill)
        for optimizer, parameters, gradients in updates:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                same = gradient.stride() == parameter.stride()  # as fused SGD requires
                parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        for optimizer in others:  # of parameters that one loss reaches
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"sgd": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self._optimizers, state["sgd"], strict=True):
            optimizer.load_state_dict(saved)
