"""The training loop: epochs of steps, an evaluation and a checkpoint after each."""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mdistiller_norm.data import EvalLoader
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import Saver
from mdistiller_norm.engine.evaluate import Evaluation, evaluate
from mdistiller_norm.engine.logger import Record, RunLog
from mdistiller_norm.engine.optim import StepSchedule, set_learning_rate
from mdistiller_norm.engine.runtime import keep_freed_memory
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import Raw
from mdistiller_norm.errors import Interrupted as Interrupted
from mdistiller_norm.errors import NonFiniteLossError


class Trainer:
    """Trains until the last epoch, and keeps ``latest.pt``, ``best.pt`` and the students in the run folder.

    Args:
        step: one training step.
        schedule: learning rate by epoch.
        test: the split that is evaluated after each epoch.
        epochs: to train, counted from 1.
        seed: of the run.
        folder: the run folder; exists.
        log: of the run.
        about: facts kept beside the student's weights (its name, classes, data set, normalisation).
        identity: what a checkpoint must agree with to be resumed (the config, the teacher's hash).
        where: versions, device and processes of this part of the training, for its record.
        save_every: epochs between the students that are kept (``student_<epoch>.pt``).
        log_every: steps between scalars by step.
        checkpoint_steps: steps between two states of ``latest.pt`` within an epoch; 0 for none.
        ahead: work to be done before the first step, bit by bit (filling the teacher cache).
        run_step: ``step``, or a faster form of the same (a captured one).
        run_test: the student, or a faster form of it, for evaluation.
        show_progress: on a bar.
    """

    def __init__(
        self,
        *,
        step: TrainStep,
        schedule: StepSchedule,
        test: EvalLoader,
        epochs: int,
        seed: int,
        folder: Path,
        log: RunLog,
        about: Record,
        identity: Record,
        where: Record,
        save_every: int,
        log_every: int,
        checkpoint_steps: int = 0,
        ahead: Iterable[None] = (),
        run_step: Callable[..., None] | None = None,
        run_test: Callable[[Tensor], Tensor] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.step, self.schedule, self.test, self.epochs, self.seed = step, schedule, test, epochs, seed
        self.folder, self.log, self.about, self.identity = folder, log, about, identity
        self.save_every, self.log_every, self.checkpoint_steps = save_every, log_every, checkpoint_steps
        self.ahead, self.run_step, self.run_test = ahead, run_step or step, run_test
        self.show_progress = show_progress
        self._saver = Saver(folder, background=step.factors.is_cuda)
        self.epoch, self.steps_done, self.seconds = 1, 0, 0.0  # where training goes on
        self.best: Record = {}
        self.last: Record = {}
        self.parts: list[Record] = [{"from_step": 0, **where}]  # one where nothing changed when it was resumed
        self._asked = self._stop = 0  # the signal that came; and the one that all processes know of
        self._since = time.perf_counter()  # what of the epoch's time is not yet in seconds
        self._waited = 0.0  # for the data of the epoch
        self._paces: deque[float] = deque(maxlen=9)  # seconds of the last epochs
        self._batches: Iterator[Raw] = iter(())  # of the epoch, from a step on
        self._place = (0, 0)  # epoch and step (counted from 0) of the next of them

    def fit(self) -> Record:
        """Train to the end.

        Returns:
            ``last`` and ``best`` accuracies and the seconds it took.

        Raises:
            Interrupted: on SIGINT, SIGTERM or SIGUSR1 (to any of the processes), with the state saved; nothing has
                changed since the last one where the teacher's answers were being computed ahead.
            NonFiniteLossError: a loss or a weight became NaN or infinite.
        """
        with stop_signals(self.stop):
            for _ in self.ahead:
                if self._asked:
                    break
            if stop := distributed.all_reduce_max(
                self._asked
            ):  # here, since the processes' shares differ in their length
                raise Interrupted(stop)
            for _ in self.turns():
                self.run_step(*self.next_batch())
        return self.summary()

    def stop(self, signal_number: int) -> None:
        """Ask for an end after the coming step, with the state saved."""
        self._asked = signal_number

    def summary(self) -> Record:
        """``last`` and ``best`` accuracies, the seconds it took, and the parts that it was trained in."""
        return {"last": self.last, "best": self.best, "seconds": self.seconds, "parts": self.parts}

    def turns(self) -> Iterator[None]:
        """Everything from here to the end of the training but its steps: for each of them it yields once.

        Raises:
            Interrupted: see :meth:`fit`.
            NonFiniteLossError: see :meth:`fit`.
        """
        keep_freed_memory()
        try:
            yield from self._all_turns()
        finally:
            self._saver.finish()

    def _all_turns(self) -> Iterator[None]:
        while self.epoch <= self.epochs:
            start = self._since = time.perf_counter()
            lr = self.schedule(self.epoch)
            set_learning_rate(self.step.optimizer.param_groups, lr)
            self.step.begin_epoch(self.epoch, self.seed)
            fresh = 1 - self.steps_done / self.step.loader.steps  # the part of the epoch that is run now
            self._waited = 0.0
            yield from self._epoch_turns()
            if self._stop and self.steps_done < self.step.loader.steps:
                self._save_latest()
                raise Interrupted(self._stop)
            averages = self.step.meters.read(self.epoch, together=True)
            trained = time.perf_counter() - start
            distributed.average_batch_norms(self.step.trainable)
            test = evaluate(self.step.trainable.student, self.test, self.step.trainable.autocast, self.run_test)
            if not math.isfinite(test.loss):  # an update after the last loss that was looked at
                raise NonFiniteLossError(
                    f"the test loss became NaN or infinite after epoch {self.epoch}: training stopped, the last good "
                    "checkpoint stays; a lower SOLVER.LR or SOLVER.PRECISION fp32 may help"
                )
            now = time.perf_counter()
            self.seconds += now - self._since
            self._paces.append(trained / fresh + now - start - trained)
            record = {f"loss_{name}": value for name, value in averages.losses.items()} | {
                "epoch": self.epoch, "lr": lr, "train_top1": averages.top1, "test_top1": test.top1,
                "test_top5": test.top5, "test_loss": test.loss, "data_wait": self._waited / trained,
                "images_per_second": averages.samples * fresh / trained,
                "seconds": self.seconds,
            }  # fmt: skip
            self._end_epoch(record, test)
            self._stop = distributed.all_reduce_max(self._asked)
            if self._stop and self.epoch <= self.epochs:
                raise Interrupted(self._stop)

    def next_batch(self) -> Raw:
        """The inputs of the coming step."""
        before = time.perf_counter()
        if self._place != (self.epoch, self.steps_done):  # or another trainer took batches for this one
            self._batches = self.step.feed(self.step.loader.batches(self.epoch, self.steps_done))
        raw = next(self._batches)
        self._place = (self.epoch, self.steps_done + 1)
        self.step.part = self.step.loader.part(self.steps_done)
        self._waited += time.perf_counter() - before
        return raw

    def _epoch_turns(self) -> Iterator[None]:
        """A turn for each of the rest of the epoch's steps."""
        loader, meters = self.step.loader, self.step.meters
        self.step.trainable.train()
        bar = tqdm(
            total=loader.steps, initial=self.steps_done, desc=f"epoch {self.epoch}/{self.epochs}", leave=False,
            mininterval=0.5, dynamic_ncols=True,
            disable=None if self.show_progress and distributed.is_first() else True,
        )  # fmt: skip
        looked = time.perf_counter()
        while self.steps_done < loader.steps and not self._stop:
            yield
            self.steps_done += 1
            bar.update()
            done = (self.epoch - 1) * loader.steps + self.steps_done
            due = done % self.log_every == 0
            lost = False
            if due or time.perf_counter() - looked > 1.0:  # the only places that wait for the device
                try:
                    averages = meters.read(self.epoch)
                except NonFiniteLossError:
                    lost = True
                else:
                    bar.set_postfix(loss=f"{averages.losses['total']:.3f}", top1=f"{averages.top1:.1f}", refresh=False)
                    if due:
                        self.log.step({f"loss_{name}": value for name, value in averages.losses.items()}, done)
                looked = time.perf_counter()
            self._stop = distributed.all_reduce_max(LOST if lost else self._asked)  # all stop after the same step
            if self._stop == LOST:
                meters.read(self.epoch, together=True)  # says so in all of them, whoever saw it first
            within = self.steps_done < loader.steps and not self._stop
            if self.checkpoint_steps and within and self.steps_done % self.checkpoint_steps == 0:
                self._save_latest()
        bar.close()

    def _end_epoch(self, record: Record, test: Evaluation) -> None:
        summary = {"epoch": self.epoch, "top1": test.top1, "top5": test.top5, "loss": test.loss}
        improved = not self.best or test.top1 >= self.best["top1"]  # the later of equals, as mdistiller keeps it
        self.last, self.best = summary, summary if improved else self.best
        self.log.epoch(record)
        losses = " ".join(f"{name[5:]} {value:.4f}" for name, value in record.items() if name.startswith("loss_"))
        left = statistics.median(self._paces) * (self.epochs - self.epoch)
        self.log.line(
            f"epoch {self.epoch}/{self.epochs}: {losses} | train top-1 {record['train_top1']:.2f} | test top-1 "
            f"{test.top1:.2f} top-5 {test.top5:.2f} loss {test.loss:.4f} | lr {record['lr']:.10g} | "
            f"{record['images_per_second']:.0f} images/s, data wait {record['data_wait']:.1%}, ETA {_clock(left)}"
            + (" | best" if improved else "")
        )
        finished = self.epoch
        self.epoch, self.steps_done = self.epoch + 1, 0
        self.step.meters.reset()
        state = self.state()
        student = {"model": self.step.trainable.student.state_dict(), "about": self.about | summary}
        files = {"best.pt": state, "student_best.pt": student} if improved else {}
        if finished % self.save_every == 0:
            files[f"student_{finished}.pt"] = student
        # latest.pt last: whatever a crash cuts off before it is done again from there.
        self._write(files | {"student_last.pt": student, "latest.pt": state})

    def _save_latest(self) -> None:
        """Save the state in mid-epoch."""
        self.step.meters.read(self.epoch, together=True)  # a state with a NaN in it must not replace a good one
        finite = [parameter.isfinite().all() for parameter in self.step.trainable.parameters()]
        if not torch.stack(finite).all():  # of an update after the last loss
            raise NonFiniteLossError(
                f"the weights became NaN or infinite at step {self.steps_done} of epoch {self.epoch}: training "
                "stopped, the last good checkpoint stays; a lower SOLVER.LR or SOLVER.PRECISION fp32 may help"
            )
        distributed.average_batch_norms(self.step.trainable)
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._write({"latest.pt": self.state()})

    def _write(self, files: dict[str, Record]) -> None:
        """Write files of the run folder, once for all processes; they need not wait for it."""
        if distributed.is_first():
            self._saver.save(files)

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from; no teacher inside, loadable with ``weights_only``.

        The same on all processes, all of which must ask for it, and of any number of them.
        """
        return {
            "trainable": self.step.trainable.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict() if self.step.scaler else {},
            "meters": self.step.meters.all_reduced_state(),
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "total_steps": (self.epoch - 1) * self.step.loader.steps + self.steps_done,
            "seconds": self.seconds,
            "best": self.best,
            "last": self.last,
            "parts": self.parts,
            "identity": self.identity,
            "about": self.about,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.step.trainable.load_state_dict(state["trainable"])
        rates = [group["lr"] for group in self.step.optimizer.param_groups]
        self.step.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.step.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the very tensor that a captured step reads; its value is set by the epoch
        if self.step.scaler:
            self.step.scaler.load_state_dict(state["scaler"])
        self.step.meters.load_all_reduced_state(state["meters"])
        self.epoch, self.steps_done, self.seconds = state["epoch"], state["steps_done"], state["seconds"]
        self.best, self.last = state["best"], state["last"]
        done = state["total_steps"]
        parts = [part for part in state.get("parts", []) if part["from_step"] < done]  # an older state has none
        here = self.parts[0] | {"from_step": done}
        same = parts and parts[-1] | {"from_step": done} == here
        self.parts = parts if same or self.epoch > self.epochs else [*parts, here]


LOST = 1 << 20  # stands for a loss that is not finite where a signal's number would stand
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stop_signals(request: Callable[[int], None], signals: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Turn the first of each of some signals into a request; a second of the same acts as it would without this.

    Args:
        request: is called with the signal's number.
        signals: that are caught, in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {int(number): signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        request(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
