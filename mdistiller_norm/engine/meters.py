"""Training metrics that live on the device: added to in every step, read only when somebody looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_norm.errors import NonFiniteLossError
from mdistiller_norm.types import Losses


class Averages(NamedTuple):
    """Training metrics of an epoch so far.

    Attributes:
        losses: mean of each loss by name, as it enters the total, and ``total``.
        top1: training accuracy in percent.
        samples: how many samples they are over.
    """

    losses: dict[str, float]
    top1: float
    samples: int


class TrainMeters(nn.Module):
    """Sums over the samples of an epoch, as buffers. A module only for its state dict and its moves between devices.

    Args:
        names: of the losses in ``Losses.parts``.
    """

    sums: Tensor
    correct: Tensor
    samples: Tensor
    step: Tensor
    first_bad: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.register_buffer("sums", torch.zeros(len(names), dtype=torch.float64))
        self.register_buffer("correct", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first_bad", torch.full((len(names),), -1, dtype=torch.int64))

    @torch.no_grad()
    def update(self, losses: Losses, targets: Tensor) -> None:
        """Add a step; no synchronisation with the host."""
        parts = losses.parts.detach()
        self.step += 1
        self.sums += parts * len(targets)
        self.correct += (losses.logits.argmax(1) == targets).sum()
        self.samples += len(targets)
        news = ~parts.isfinite() & (self.first_bad < 0)
        self.first_bad.copy_(torch.where(news, self.step, self.first_bad))

    def reset(self) -> None:
        """Forget everything: a new epoch."""
        for buffer in (self.sums, self.correct, self.samples, self.step):
            buffer.zero_()
        self.first_bad.fill_(-1)

    def read(self, epoch: int) -> Averages:
        """The averages so far; this one waits for the device.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; names it, the epoch and the step (counted from 1).
        """
        bad = {name: step for name, step in zip(self.names, self.first_bad.tolist(), strict=True) if step > 0}
        if bad:
            step = min(bad.values())
            guilty = " and ".join(name for name in bad if bad[name] == step)
            raise NonFiniteLossError(
                f"the loss {guilty} became NaN or infinite in epoch {epoch}, step {step}: training stopped, the last "
                "good checkpoint stays; a lower SOLVER.LR, a higher temperature or SOLVER.PRECISION fp32 may help"
            )
        samples = int(self.samples)
        means = [value / max(samples, 1) for value in self.sums.tolist()]
        losses = dict(zip(self.names, means, strict=True)) | {"total": sum(means)}
        return Averages(losses, 100 * int(self.correct) / max(samples, 1), samples)
