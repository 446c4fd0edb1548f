"""DOT: separate momenta for cross entropy and for distillation.

Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (ICCV 2023). The momentum of the task's gradient is lowered
by Delta and that of the distillation's is raised by it, so that distillation dominates early training. As in the
authors' code, weight decay belongs to the task's gradient, and parameters that only one loss reaches keep the usual
momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.data import TrainLoader
from mdistiller_norm.engine.optim import build_sgd
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.types import Batch


def _gradients(
    loss: Tensor, parameters: Sequence[nn.Parameter], keep_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradients in the memory layout of their parameters, which fused SGD requires."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True)
    return [
        gradient
        if gradient is None or gradient.stride() == like.stride()
        else torch.empty_like(like).copy_(gradient)
        for gradient, like in zip(gradients, parameters, strict=True)
    ]


class DOT:
    """Two SGD optimizers over the same parameters, for the gradients of the task and of the distillation.

    With ``v_task = (mu - delta) v_task + g_task`` and ``v_kd = (mu + delta) v_kd + g_kd``, two SGD steps in a row
    compute ``theta - lr * (v_task + v_kd)``.

    Args:
        trainable: to train. A copy runs once, to find the parameters that each loss reaches.
        batch: any training batch, for that run.
        teacher: likewise.
        delta: added to one momentum and subtracted from the other.
        sgd: the other arguments of :func:`~mdistiller_norm.engine.optim.build_sgd`.
    """

    def __init__(
        self, trainable: Trainable, batch: Batch, teacher: Teacher, delta: float, **sgd: Any
    ) -> None:
        trial = copy.deepcopy(trainable)
        with torch.no_grad():
            teacher_outputs = teacher.network.outputs(batch.images)
        # Not Losses.parts: the gradient of an item of a stacked tensor is zero, not None, for the other items.
        cross_entropy, *methods = trial.losses(trial.student_outputs(batch.images), batch, teacher_outputs)
        copies, parameters = ([p for p in one.parameters() if p.requires_grad] for one in (trial, trainable))
        task = _gradients(cross_entropy, copies, keep_graph=True)
        distill = _gradients(torch.stack(methods).sum(), copies)
        reached = [(a is not None, b is not None) for a, b in zip(task, distill, strict=True)]
        both, task_only, distill_only = (
            [parameter for parameter, by in zip(parameters, reached, strict=True) if by == wanted]
            for wanted in ((True, True), (True, False), (False, True))
        )
        momentum, decay = sgd.pop("momentum"), sgd.pop("weight_decay")
        self._task = both + task_only
        self._distill = both + distill_only
        groups = (
            (both, momentum - delta, decay),
            (both, momentum + delta, 0.0),
            (task_only, momentum, decay),
            (distill_only, momentum, decay),
        )
        self._optimizers = [
            build_sgd(group, momentum=mu, weight_decay=wd, **sgd) for group, mu, wd in groups if group
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimizers."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, parts: Tensor) -> None:
        """Differentiate the weighted losses ``[1 + distillers]`` separately and update the parameters."""
        task = _gradients(parts[0], self._task, keep_graph=True)
        distill = _gradients(parts[1:].sum(), self._distill)
        by_task, by_distill, *others = self._optimizers
        for parameter, gradient in zip(self._task, task, strict=True):
            parameter.grad = gradient
        by_task.step()
        for parameter, gradient in zip(self._distill, distill, strict=True):
            parameter.grad = gradient
        by_distill.step()
        for optimizer in others:  # of parameters that one loss reaches
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the optimizers."""
        return {"sgd": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load :meth:`state_dict`."""
        for optimizer, saved in zip(self._optimizers, state["sgd"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizer(
    trainable: Trainable,
    loader: TrainLoader,
    teacher: Teacher | None,
    *,
    trainer: str,
    delta: float,
    **sgd: Any,
) -> torch.optim.Optimizer | DOT:
    """Build SGD, or DOT if ``trainer`` (``SOLVER.TRAINER``) ends with dot. ``sgd`` holds arguments of ``build_sgd``."""
    if not trainer.endswith("dot"):
        return build_sgd(trainable.parameters(), **sgd)
    assert teacher is not None  # checked by build_execution
    batch = loader.prepare(*next(loader.batches(1)))
    return DOT(trainable, batch, teacher, delta, **sgd)
