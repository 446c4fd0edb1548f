"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSchedule:
    """Learning rate that falls by a factor after given epochs.

    Attributes:
        base: learning rate of the first epoch.
        stages: epochs, counted from 1, after which it falls: with 150 the first epoch at the lower rate is 151.
        rate: the factor.
    """

    base: float
    stages: Sequence[int]
    rate: float

    def __call__(self, epoch: int) -> float:
        """Learning rate of that epoch, counted from 1."""
        return self.base * self.rate ** sum(epoch > stage for stage in self.stages)


def build_sgd(
    parameters: Iterable[torch.nn.Parameter], *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> torch.optim.SGD:
    """SGD in one fused kernel; weight decay on every parameter, as the reference has it.

    The momentum buffers start as zeros instead of being made in the first step, so that no step is special; the update
    is the same. On CUDA the learning rate is a tensor, which a captured step reads anew.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    rate: float | Tensor = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    optimizer = torch.optim.SGD(
        trained, lr=rate, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    if momentum:
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Write a learning rate into every parameter group, in place where it is a tensor."""
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
