"""One training step: a function of static inputs without a single wait for the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mdistiller_norm.data import TrainLoader
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.teacher import Raw, Teacher
from mdistiller_norm.engine.trainable import Trainable


class TrainStep:
    """Augmentation, teacher, student, backward, optimizer and metrics, in this order.

    What changes from step to step comes in as tensors (``raw``); what changes from epoch to epoch lives in ``factors``
    and in the optimizer's learning rate, written in place. That is what lets a step be captured and replayed.

    Args:
        loader: turns ``raw`` into a batch.
        teacher: None for plain training.
        trainable: student and distillers.
        optimizer: over the parameters of ``trainable``.
        meters: where the step's losses go.
        scaler: for fp16 gradients.
        forward: ``trainable`` or a wrapper of it (DistributedDataParallel); ``trainable`` when not given.
    """

    def __init__(
        self,
        loader: TrainLoader,
        teacher: Teacher | None,
        trainable: Trainable,
        optimizer: torch.optim.Optimizer | DOT,
        meters: TrainMeters,
        scaler: torch.amp.GradScaler | None = None,
        forward: nn.Module | None = None,
    ) -> None:
        self.loader, self.teacher, self.trainable = loader, teacher, trainable
        self.optimizer, self.meters, self.scaler = optimizer, meters, scaler
        self.forward = forward or trainable
        device = next(trainable.parameters()).device
        self.factors = torch.tensor(trainable.factors(1), device=device)

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """Write what changes with the epoch (counted from 1)."""
        self.factors.copy_(torch.tensor(self.trainable.factors(epoch)))
        for method in self.trainable.methods():
            method.begin_epoch(epoch, seed)

    def feed(self, batches: Iterator[Raw]) -> Iterator[Raw]:
        """The inputs of a step for each batch: what names it, and what a cached teacher said of it."""
        return self.teacher.feed(batches) if self.teacher else batches

    def __call__(self, *raw: Tensor) -> None:
        """Train on the batch that ``raw`` names (an item of :meth:`feed`)."""
        split = len(raw) - (self.teacher.extra if self.teacher else 0)
        batch = self.loader.prepare(*raw[:split])
        taught = self.teacher(batch, *raw[split:]) if self.teacher else None
        losses = self.forward(batch, taught, self.factors)
        if isinstance(self.optimizer, DOT):
            self.optimizer.step(losses.parts)
        elif self.scaler:
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(losses.total).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            self.optimizer.step()
        self.meters.update(losses, batch.targets)
