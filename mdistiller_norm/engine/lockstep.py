"""Several students in one process, on the same batches, with one pass of the teacher for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.trainer import Interrupted, Trainer, stop_signals
from mdistiller_norm.errors import UserError

RunStep = Callable[..., None]


class Lockstep:
    """The steps of several students on one batch: data and teacher once, then each student as it would learn alone.

    On CUDA every student has a stream, so that small kernels of different ones run at the same time.

    Args:
        steps: with one loader and one teacher between them.
    """

    def __init__(self, steps: Sequence[TrainStep]) -> None:
        self.steps = list(steps)
        device = self.steps[0].factors.device
        count = len(self.steps) if device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]

    def __call__(self, *raw: Tensor) -> None:
        """Train all on the batch that ``raw`` names."""
        for lesson in self.steps[0].lessons(*raw):
            for step in self._side_by_side():
                step.learn(lesson)
        for step in self._side_by_side():
            step.update()

    def _side_by_side(self) -> Iterator[TrainStep]:
        """Each step in turn, on its own stream where there are some; the current one goes on after all of them."""
        for number, step in enumerate(self.steps):
            with self._stream(number):
                yield step
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def _stream(self, number: int) -> Iterator[None]:
        if not self._streams:
            yield
            return
        stream = self._streams[number]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield

    def state_tensors(self) -> list[Tensor]:
        """Every tensor that the steps write to."""
        return [tensor for step in self.steps for tensor in step.state_tensors()]


class _Progress:
    """The trainers' turns, taken together: those that were saved at an earlier step catch up first."""

    def __init__(self, trainers: Sequence[Trainer], run_together: Callable[[Sequence[TrainStep]], RunStep]) -> None:
        self.turns = {trainer: trainer.turns() for trainer in trainers}
        self.run_together = run_together
        self.failed: dict[Trainer, UserError] = {}
        self.interrupted: Interrupted | None = None
        self._steps: dict[tuple[Trainer, ...], RunStep] = {}

    def step(self) -> list[Trainer]:
        """One step of all that are furthest behind; returns them."""
        place = min((trainer.epoch, trainer.steps_done) for trainer in self.turns)
        group = [trainer for trainer in self.turns if (trainer.epoch, trainer.steps_done) == place]
        self._run_step(group)(*group[0].next_batch())
        return group

    def advance(self, trainers: Sequence[Trainer]) -> None:
        """Let trainers go on to their next step. Those that come to an end, whichever, take no more turns."""
        for trainer in trainers:
            try:
                next(self.turns[trainer])
                continue
            except StopIteration:
                pass
            except Interrupted as stop:
                self.interrupted = stop
            except UserError as error:
                trainer.log.line(f"error: {error}")  # now: the others may go on for hours
                self.failed[trainer] = error
            del self.turns[trainer]

    def _run_step(self, group: Sequence[Trainer]) -> RunStep:
        if len(group) == 1:
            return group[0].run_step
        key = tuple(group)
        if key not in self._steps:
            self._steps[key] = self.run_together([trainer.step for trainer in group])
        return self._steps[key]


def fit_together(
    trainers: Sequence[Trainer], run_together: Callable[[Sequence[TrainStep]], RunStep]
) -> dict[Trainer, UserError]:
    """Train all to their ends. Each is what it would have been alone on that order of the data.

    Args:
        trainers: of runs that share loader and teacher; may have been saved at different steps.
        run_together: makes one step of several, a :class:`Lockstep` or a captured one.

    Returns:
        What made trainers fail; the others went on without them.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGUSR1, with the state of all saved.
    """
    asked = 0

    def request(signal_number: int) -> None:
        nonlocal asked
        asked = signal_number

    with stop_signals(request):
        for trainer in trainers:
            for _ in trainer.ahead:
                if asked:
                    raise Interrupted(asked)
        progress = _Progress(trainers, run_together)
        progress.advance(trainers)
        while progress.turns and not progress.interrupted:
            group = progress.step()
            if asked:  # between two steps, so that all of them stop after the same one
                for trainer in group:
                    trainer.stop(asked)
            progress.advance(group)
    if progress.interrupted:
        raise progress.interrupted
    return progress.failed
