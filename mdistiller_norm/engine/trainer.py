"""The training loop: epochs of steps, each followed by an evaluation and a checkpoint."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from mdistiller_norm.data import EvalLoader
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import LATEST, PREVIOUS, save_atomically
from mdistiller_norm.engine.evaluate import Evaluation, evaluate
from mdistiller_norm.engine.logger import Record, RunLog
from mdistiller_norm.engine.optim import Schedule, set_learning_rate
from mdistiller_norm.engine.runtime import keep_freed_memory, progress, stop_signals
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.errors import Interrupted, NonFiniteLossError

NON_FINITE = 1 << 20  # exchanged between processes like the number of a signal
READ_SECONDS = 1.0  # between two readings of the metrics


@dataclass(frozen=True)
class Intervals:
    """Intervals of logging and saving."""

    log_steps: int  # between losses logged by step
    save_steps: int  # between states saved within an epoch; 0 for none
    keep_epochs: int  # between students that are kept (student_<epoch>.pt)
    grad_norms: bool  # of each epoch's first batch


@dataclass(frozen=True)
class Provenance:
    """Records of a run that are saved with its state."""

    about: Record  # metadata of the student's weights
    identity: Record  # must not change when the run is resumed
    environment: Record  # versions, device and number of processes


class Trainer:
    """Train until the last epoch; write ``latest.pt``, ``best.pt`` and the students to the run folder.

    Args:
        test: split that is evaluated after each epoch.
        run_step: ``step`` or its captured form.
        run_test: captured form of the student for evaluation, or None.

    Attributes:
        epoch: current epoch, counted from 1.
        steps_done: steps of that epoch that are done.
        prefetch: iterated before the first step; fills a teacher cache.
    """

    def __init__(
        self,
        step: TrainStep,
        schedule: Schedule,
        test: EvalLoader,
        folder: Path,
        log: RunLog,
        provenance: Provenance,
        intervals: Intervals,
        run_step: Callable[..., None],
        run_test: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.step, self.schedule, self.test = step, schedule, test
        self.folder, self.log = folder, log
        self.provenance, self.intervals = provenance, intervals
        self.run_step, self.run_test = run_step, run_test
        self.prefetch: Iterable[None] = ()
        self.epoch, self.steps_done, self.seconds = 1, 0, 0.0
        self.best: Record = {}
        self.last: Record = {}
        self.grad_norms: dict[str, float] = {}  # of the current epoch
        self.parts: list[Record] = [{"from_step": 0, **provenance.environment}]
        self._requested = 0  # number of the signal that requested a stop
        self._counted_until = 0.0  # time up to which `seconds` counts
        self._last_read = 0.0  # time of the last metrics

    @property
    def finished(self) -> bool:
        return self.epoch > self.schedule.epochs

    @property
    def total_steps(self) -> int:
        return (self.epoch - 1) * self.step.loader.steps + self.steps_done

    def fit(self) -> Record:
        """Train to the end; return the ``last`` and ``best`` accuracies, the seconds and the parts of the training.

        Raises:
            Interrupted: a process received SIGINT, SIGTERM or SIGUSR1; the state is saved.
            NonFiniteLossError: a loss or a weight became NaN or infinite.
        """
        with stop_signals(self.stop):
            for _ in self.prefetch:
                if self._requested:
                    break
            keep_freed_memory()
            while not self.finished:
                if stop := distributed.all_reduce_max(self._requested):
                    raise Interrupted(stop)
                self._train_epoch()
        if not (self.folder / "student_last.pt").exists():
            self._save({"student_last.pt": self._student(self.last)})
        accuracies = {"last": self.last, "best": self.best}
        return accuracies | {"seconds": self.seconds, "parts": self.parts}

    def stop(self, signal_number: int) -> None:
        self._requested = signal_number

    def _train_epoch(self) -> None:
        step, loader, lr = self.step, self.step.loader, self.schedule(self.epoch)
        set_learning_rate(step.optimizer.param_groups, lr)
        step.begin_epoch(self.epoch, loader.seed)
        step.trainable.train()
        start = self._counted_until = self._last_read = time.perf_counter()
        remaining = 1 - self.steps_done / loader.steps
        waited = self._train_steps()
        averages = step.meters.read(self.epoch, together=True)
        trained = time.perf_counter() - start
        distributed.average_batch_norms(step.trainable)
        evaluated, autocast = step.trainable.evaluated, step.trainable.autocast
        test = evaluate(evaluated, self.test, autocast, self.run_test)
        if not math.isfinite(test.loss):  # of the last update
            raise NonFiniteLossError("the test loss", f"after epoch {self.epoch}")
        self.seconds += time.perf_counter() - self._counted_until
        record = {
            **{f"loss_{name}": value for name, value in averages.losses.items()},
            **self.grad_norms,
            "epoch": self.epoch,
            "lr": lr,
            "train_top1": averages.top1,
            "test_top1": test.top1,
            "test_top5": test.top5,
            "test_loss": test.loss,
            "data_wait": waited / trained,
            "images_per_second": averages.samples * remaining / trained,
            "seconds": self.seconds,
        }
        self._end_epoch(record, test)

    def _train_steps(self) -> float:
        step, loader, save_steps = self.step, self.step.loader, self.intervals.save_steps
        waited, waiting_since = 0.0, time.perf_counter()
        with progress(
            total=loader.steps,
            initial=self.steps_done,
            desc=f"epoch {self.epoch}/{self.schedule.epochs}",
            disable=not distributed.is_first(),
        ) as bar:
            for batch in step.with_teacher_outputs(loader.batches(self.epoch, self.steps_done)):
                waited += time.perf_counter() - waiting_since
                step.part = loader.part(self.steps_done)
                if self.intervals.grad_norms and self.steps_done == 0:
                    self.grad_norms = step.gradient_norms(*batch)
                self.run_step(*batch)
                self.steps_done += 1
                bar.update()
                finite = self._log_losses(bar)
                stop = distributed.all_reduce_max(self._requested if finite else NON_FINITE)
                if stop == NON_FINITE:
                    step.meters.read(self.epoch, together=True)  # raises
                within = self.steps_done < loader.steps
                if within and (stop or (save_steps and self.steps_done % save_steps == 0)):
                    self._save_latest()
                if within and stop:
                    raise Interrupted(stop)
                waiting_since = time.perf_counter()
        return waited

    def _log_losses(self, bar: Any) -> bool:
        """Show the running averages at intervals and log them; return whether all losses are finite."""
        due = self.total_steps % self.intervals.log_steps == 0
        if not due and time.perf_counter() - self._last_read <= READ_SECONDS:
            return True
        try:
            losses, top1, _ = self.step.meters.read(self.epoch)
        except NonFiniteLossError:
            return False
        bar.set_postfix(loss=f"{losses['total']:.3f}", top1=f"{top1:.1f}", refresh=False)
        if due:
            self.log.step(losses, self.total_steps)
        self._last_read = time.perf_counter()
        return True

    def _end_epoch(self, record: Record, test: Evaluation) -> None:
        epoch = self.epoch
        summary = {"epoch": epoch, "top1": test.top1, "top5": test.top5, "loss": test.loss}
        improved = not self.best or test.top1 >= self.best["top1"]  # as in mdistiller
        self.last, self.best = summary, summary if improved else self.best
        self.log.epoch(record)
        losses = [f"{k[5:]} {v:.4f}" for k, v in record.items() if k.startswith("loss_")]
        average = "EMA " if self.step.trainable.ema is not None else ""
        epochs = self.schedule.epochs
        left = timedelta(seconds=round(self.seconds / epoch * (epochs - epoch)))
        self.log.line(
            f"epoch {epoch}/{epochs}: {' '.join(losses)} | train top-1 {record['train_top1']:.2f} | "
            f"{average}test top-1 {test.top1:.2f} top-5 {test.top5:.2f} loss {test.loss:.4f} | "
            f"lr {record['lr']:.10g} | {record['images_per_second']:.0f} images/s, "
            f"data wait {record['data_wait']:.1%}, ETA {left}{' | best' * improved}"
        )
        self.epoch, self.steps_done = epoch + 1, 0
        self.step.meters.reset()
        state, student = self.state(), self._student(summary)
        files = {"best.pt": state, "student_best.pt": student} if improved else {}
        if epoch % self.intervals.keep_epochs == 0:
            files[f"student_{epoch}.pt"] = student
        # latest.pt last: after a crash, the epoch is repeated and the other files are written again.
        self._save(files | {"student_last.pt": student, LATEST: state})

    def _student(self, summary: Record) -> Record:
        weights = self.step.trainable.evaluated.state_dict()
        return {"model": weights, "about": self.provenance.about | summary}

    def _save_latest(self) -> None:
        self.step.meters.read(self.epoch, together=True)
        # The losses do not cover the last update.
        tensors = chain(self.step.trainable.parameters(), self.step.trainable.student.buffers())
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise NonFiniteLossError(
                "the weights or batch norms", f"at step {self.steps_done} of epoch {self.epoch}"
            )
        distributed.average_batch_norms(self.step.trainable)
        now = time.perf_counter()
        self.seconds, self._counted_until = self.seconds + now - self._counted_until, now
        self._save({LATEST: self.state()})

    def _save(self, files: dict[str, Record]) -> None:
        if distributed.is_first():
            for name, content in files.items():
                keep = self.folder / PREVIOUS if name == LATEST else None
                save_atomically(content, self.folder / name, keep)

    def state(self) -> dict[str, Any]:
        """Return the state to resume from. A collective operation; the state does not depend on the process."""
        step = self.step
        return {
            "trainable": step.trainable.state_dict(),
            "optimizer": step.optimizer.state_dict(),
            "scaler": step.scaler.state_dict(),
            "meters": step.meters.all_reduced_state(),
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "seconds": self.seconds,
            "best": self.best,
            "last": self.last,
            "parts": self.parts,
            "grad_norms": self.grad_norms,
            "identity": self.provenance.identity,
            "about": self.provenance.about,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state`."""
        optimizer = self.step.optimizer
        self.step.trainable.load_state_dict(state["trainable"])
        settings = [dict(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, present in zip(optimizer.param_groups, settings, strict=True):
            group.update(present)  # options of the device; the lr that a graph reads
        self.step.scaler.load_state_dict(state["scaler"])
        self.step.meters.load_all_reduced_state(state["meters"])
        self.epoch, self.steps_done = state["epoch"], state["steps_done"]
        self.seconds, self.best, self.last = state["seconds"], state["best"], state["last"]
        self.grad_norms = state.get("grad_norms", {})
        done = state["total_steps"]
        parts = [part for part in state.get("parts", []) if part["from_step"] < done]
        this_part = self.parts[0] | {"from_step": done}
        unchanged = parts and parts[-1] | {"from_step": done} == this_part
        self.parts = parts if unchanged or self.finished else [*parts, this_part]
