"""Training metrics, accumulated on the device and read only when needed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_norm.engine import distributed
from mdistiller_norm.errors import NonFiniteLossError
from mdistiller_norm.types import Losses


class Averages(NamedTuple):
    """Mean of each weighted loss by name (and ``total``), accuracy in percent and number of samples."""

    losses: dict[str, float]
    top1: float
    samples: int


class TrainMeters(nn.Module):
    """Sums over the samples of an epoch, by the names of ``Losses.parts``. A module for ``state_dict`` and ``to``."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.sums = nn.Buffer(torch.zeros(len(names), dtype=torch.float64))
        counts = (nn.Buffer(torch.zeros((), dtype=torch.int64)) for _ in range(3))
        self.correct, self.samples, self.step = counts
        self.first_bad = nn.Buffer(torch.full((len(names),), -1, dtype=torch.int64))

    @torch.no_grad()
    def update(self, losses: Losses, targets: Tensor, new_step: bool, counted: bool) -> None:
        """Add a micro-batch, without host synchronisation.

        Args:
            targets: classes ``[B]`` or class probabilities ``[B, C]``, of which the largest counts.
            new_step: whether it is the first micro-batch of a step.
            counted: False for samples of another process.
        """
        self.step.add_(new_step)
        if counted:
            classes = targets if targets.dim() == 1 else targets.argmax(1)
            self.sums.add_(losses.parts, alpha=len(targets))
            self.correct.add_((losses.logits.argmax(1) == classes).sum())
            self.samples.add_(len(targets))
        turned_bad = ~losses.parts.isfinite() & (self.first_bad < 0)
        torch.where(turned_bad, self.step, self.first_bad, out=self.first_bad)

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.first_bad.fill_(-1)

    def all_reduced_state(self) -> dict[str, Tensor]:
        largest = ("step", "first_bad")
        state = self.state_dict().items()
        return {name: distributed.all_reduce(value, name in largest) for name, value in state}

    def load_all_reduced_state(self, state: dict[str, Tensor]) -> None:
        """Load :meth:`all_reduced_state`; the sums go to the first process."""
        self.load_state_dict(state)
        if not distributed.is_first():
            for buffer in (self.sums, self.correct, self.samples):
                buffer.zero_()

    def read(self, epoch: int, together: bool = False) -> Averages:
        """Return the averages so far, of this process or of all together. Synchronises with the device.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite.
        """
        state = self.all_reduced_state() if together else self.state_dict()
        steps = zip(self.names, state["first_bad"].tolist(), strict=True)
        if bad := {name: step for name, step in steps if step > 0}:
            first = min(bad.values())
            names = " and ".join(name for name, step in bad.items() if step == first)
            raise NonFiniteLossError(f"the loss {names}", f"in epoch {epoch}, step {first}")
        samples = max(int(state["samples"]), 1)
        means = [value / samples for value in state["sums"].tolist()]
        losses = dict(zip(self.names, means, strict=True)) | {"total": sum(means)}
        return Averages(losses, 100 * int(state["correct"]) / samples, samples)
