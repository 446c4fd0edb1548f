"""SGD and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepSchedule:
    """Learning rate that is multiplied by ``rate`` after each epoch in ``stages`` (counted from 1)."""

    base: float
    stages: Sequence[int]
    rate: float

    def __call__(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 1."""
        return self.base * self.rate ** sum(epoch > stage for stage in self.stages)


def build_sgd(
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> torch.optim.SGD:
    """Build fused SGD with weight decay on every parameter."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    # On CUDA, a tensor that replayed graphs read.
    rate: float | Tensor = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    optimizer = torch.optim.SGD(
        trained, lr=rate, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True
    )
    if momentum:  # buffers of zeros give the same updates, and CUDA graphs can record any step
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of every parameter group, in place where it is a tensor."""
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
