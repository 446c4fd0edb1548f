"""DOT: separate momenta for cross entropy and for distillation.

Source: Zhao et al., "DOT: A Distillation-Oriented Trainer" (ICCV 2023): the momentum of the task's gradient is lowered
by Delta and that of the distillation's is raised by it, so that the latter dominates early training. As in the authors'
code, weight decay belongs to the task's gradient, and a parameter that only one of the losses reaches keeps the usual
momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller_norm.engine.optim import build_sgd
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.types import Batch


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], keep_graph: bool = False) -> list[Tensor | None]:
    """The gradients, in the memory layout of their parameters: a fused SGD takes that for granted."""
    found = torch.autograd.grad(loss, parameters, retain_graph=keep_graph, allow_unused=True)
    return [None if one is None else _laid_out(one, like) for one, like in zip(found, parameters, strict=True)]


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient if gradient.stride() == like.stride() else torch.empty_like(like).copy_(gradient)


class DOT:
    """Two SGDs over the same parameters: one steps on the task's gradients, the other on the distillation's.

    With ``v_task = (mu - delta) v_task + g_task`` and ``v_kd = (mu + delta) v_kd + g_kd``, two plain steps in a row are
    ``theta - lr * (v_task + v_kd)``.

    Args:
        trainable: what to train.
        batch: any training batch, and
        teacher: the teacher: a copy of ``trainable`` is run on it once, to see which loss reaches which parameter.
        delta: what the momenta differ by.
        sgd: the other arguments of :func:`~mdistiller_norm.engine.optim.build_sgd`.
    """

    def __init__(self, trainable: Trainable, batch: Batch, teacher: Teacher, delta: float, **sgd: Any) -> None:
        trial = copy.deepcopy(trainable)
        with torch.no_grad():
            taught = teacher.network.outputs(batch.images)
        # Apart, not as Losses.parts: differentiating an item of a tensor reaches, with zeros, what the others need.
        cross_entropy, *methods = trial.losses(trial.student_outputs(batch.images), batch, taught)
        watched, parameters = ([p for p in one.parameters() if p.requires_grad] for one in (trial, trainable))
        task = _gradients(cross_entropy, watched, keep_graph=True)
        distill = _gradients(torch.stack(methods).sum(), watched)
        both, task_only, distill_only = (
            [p for p, a, b in zip(parameters, task, distill, strict=True) if (a is not None, b is not None) == reached]
            for reached in ((True, True), (True, False), (False, True))
        )
        momentum, decay = sgd.pop("momentum"), sgd.pop("weight_decay")
        self._task = both + task_only
        self._distill = both + distill_only
        self._optimizers = [
            build_sgd(group, momentum=mu, weight_decay=wd, **sgd)
            for group, mu, wd in (
                (both, momentum - delta, decay),
                (both, momentum + delta, 0.0),
                (task_only, momentum, decay),
                (distill_only, momentum, decay),
            )
            if group
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all the SGDs."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self, parts: Tensor) -> None:
        """Differentiate the losses apart, on one graph, and step.

        Args:
            parts: ``[1 + distillers]``, cross entropy first, weighted.
        """
        task = _gradients(parts[0], self._task, keep_graph=True)
        distill = _gradients(parts[1:].sum(), self._distill)
        by_task, by_distill, *others = self._optimizers
        for parameter, gradient in zip(self._task, task, strict=True):
            parameter.grad = gradient
        by_task.step()
        for parameter, gradient in zip(self._distill, distill, strict=True):
            parameter.grad = gradient
        by_distill.step()
        for optimizer in others:  # over parameters that just one of the losses reaches
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of the SGDs."""
        return {"sgd": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for optimizer, saved in zip(self._optimizers, state["sgd"], strict=True):
            optimizer.load_state_dict(saved)
