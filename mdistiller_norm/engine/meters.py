"""Training metrics that live on the device: added to in every step, read only when somebody looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_norm.engine import distributed
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
    def update(self, losses: Losses, targets: Tensor, new_step: bool = True, counted: bool = True) -> None:
        """Add a step, or another part of one; no synchronisation with the host.

        Args:
            losses: of the step.
            targets: ``[B]``.
            new_step: it is the first part of a step.
            counted: its samples are this process's own.
        """
        parts = losses.parts.detach()
        self.step += new_step
        if counted:
            self.sums.add_(parts, alpha=len(targets))
            self.correct += (losses.logits.argmax(1) == targets).sum()
            self.samples += len(targets)
        news = (parts - parts != 0) & (self.first_bad < 0)  # NaN and infinity less themselves are NaN
        torch.where(news, self.step, self.first_bad, out=self.first_bad)

    def reset(self) -> None:
        """Forget everything: a new epoch."""
        for buffer in (self.sums, self.correct, self.samples, self.step):
            buffer.zero_()
        self.first_bad.fill_(-1)

    def all_reduced_state(self) -> dict[str, Tensor]:
        """The state of all processes together; all of them must ask for it."""
        own = self.state_dict()
        joined = {name: distributed.total(own[name]) for name in ("sums", "correct", "samples")}
        return own | joined | {name: distributed.largest(own[name]) for name in ("step", "first_bad")}

    def load_all_reduced_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`all_reduced_state` gave, so that together the processes have it once."""
        self.load_state_dict(state)
        if not distributed.is_first():
            for buffer in (self.sums, self.correct, self.samples):
                buffer.zero_()

    def read(self, epoch: int, together: bool = False) -> Averages:
        """The averages so far; this one waits for the device.

        Args:
            epoch: for the message.
            together: over all processes, all of which must ask for it; else over this one's samples.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; names it, the epoch and the step (counted from 1).
        """
        state = self.all_reduced_state() if together else self.state_dict()
        bad = {name: step for name, step in zip(self.names, state["first_bad"].tolist(), strict=True) if step > 0}
        if bad:
            step = min(bad.values())
            guilty = " and ".join(name for name in bad if bad[name] == step)
            raise NonFiniteLossError(
                f"the loss {guilty} became NaN or infinite in epoch {epoch}, step {step}: training stopped, the last "
                "good checkpoint stays; a lower SOLVER.LR, a higher temperature or SOLVER.PRECISION fp32 may help"
            )
        samples = int(state["samples"])
        means = [value / max(samples, 1) for value in state["sums"].tolist()]
        losses = dict(zip(self.names, means, strict=True)) | {"total": sum(means)}
        return Averages(losses, 100 * int(state["correct"]) / max(samples, 1), samples)
