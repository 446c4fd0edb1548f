"""One training step: a function of static inputs without a single wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller_norm.data import TrainLoader
from mdistiller_norm.data.plan import Part
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.teacher import Raw, Teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.types import Batch, Losses, Outputs


class Lesson(NamedTuple):
    """What a student sees at once: a batch, or one of the parts of it whose gradients are added up.

    Attributes:
        batch: augmented.
        taught: what the teacher says of it; None for plain training.
        share: its weight in the mean over the whole batch.
        first: of its batch.
        last: of its batch.
        counted: its samples are this process's own.
    """

    batch: Batch
    taught: Outputs | None
    share: float
    first: bool
    last: bool
    counted: bool


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
        accumulate: parts of the batch whose gradients are added up, one after the other, for one update.

    Attributes:
        part: this process's part of the coming batch, for those that train together.
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
        accumulate: int = 1,
    ) -> None:
        self.loader, self.teacher, self.trainable = loader, teacher, trainable
        self.optimizer, self.meters, self.scaler = optimizer, meters, scaler
        self.forward = forward or trainable
        self.accumulate = accumulate
        self.part: Part | None = None
        device = next(trainable.parameters()).device
        self.factors = torch.tensor(trainable.factors(1), device=device)
        if scaler:
            scaler.scale(torch.zeros((), device=device))  # its tensors are there from now on

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
        for lesson in self.lessons(*raw):
            self.learn(lesson)
        self.update()

    def lessons(self, *raw: Tensor) -> Iterator[Lesson]:
        """The batch that ``raw`` names, augmented and with what the teacher says of it: whole, or part after part."""
        split = len(raw) - (self.teacher.extra if self.teacher else 0)
        batch, extra = self.loader.prepare(*raw[:split]), raw[split:]
        rows, weight = len(batch.targets), self.part.weight if self.part else 1.0
        count = min(self.accumulate, self.part.smallest if self.part else rows)
        pieces = _split(batch, extra, count) if count > 1 else [(batch, extra)]
        for number, (piece, own) in enumerate(pieces, 1):
            taught = self.teacher(piece, *own) if self.teacher else None
            share = weight * len(piece.targets) / rows
            yield Lesson(piece, taught, share, first=number == 1, last=number == count, counted=weight > 0)

    def learn(self, lesson: Lesson) -> None:
        """Losses, gradients and metrics of a lesson; DOT's update too."""
        batch = lesson.batch
        if isinstance(self.optimizer, DOT):
            losses = self._losses(lesson)
            self.optimizer.step(losses.parts)
            self.meters.update(losses, batch.targets)
            return
        if lesson.first:
            self.optimizer.zero_grad(set_to_none=True)
        with self._gradients_stay_here(not lesson.last):
            losses = self._losses(lesson)
            loss = losses.total if lesson.share == 1 else losses.total * lesson.share
            loss = self.scaler.scale(loss) if self.scaler else loss
            loss.backward()  # type: ignore[no-untyped-call]
        self.meters.update(losses, batch.targets, new_step=lesson.first, counted=lesson.counted)

    def update(self) -> None:
        """Change the weights by the gradients of the lessons."""
        if isinstance(self.optimizer, DOT):
            return
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that a step writes to: weights, statistics, momenta, metrics, the scale of fp16 gradients."""
        modules: list[nn.Module] = [self.trainable, self.meters]
        states = [module.state_dict(keep_vars=True) for module in modules]
        written = [tensor.data for tensor in _tensors(states)]
        return [*written, *_tensors(self.optimizer.state_dict()), *_tensors(vars(self.scaler) if self.scaler else ())]

    def _losses(self, lesson: Lesson) -> Losses:
        losses: Losses = self.forward(lesson.batch, lesson.taught, self.factors)
        return losses

    def _gradients_stay_here(self, more_to_come: bool) -> AbstractContextManager[None]:
        """Whether this pass leaves the exchange of the gradients with other processes to a later one."""
        if more_to_come and isinstance(self.forward, DistributedDataParallel):
            return self.forward.no_sync()
        return nullcontext()


def _split(batch: Batch, extra: Raw, count: int) -> list[tuple[Batch, Raw]]:
    """A batch and the tensors that belong to its samples in as many parts, sizes differing by at most one."""
    own = ("images", "targets", "indices", "views")
    whole = (*(getattr(batch, name) for name in own), *extra)
    parts = zip(*(tensor.tensor_split(count) for tensor in whole), strict=True)
    return [(batch._replace(**dict(zip(own, part, strict=False))), part[len(own) :]) for part in parts]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of dictionaries, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
