"""Runs jobs on this machine: some at a time, teachers first, until all are finished or somebody stops it."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdistiller_norm.engine.runtime import slot_environment
from mdistiller_norm.engine.signals import stop_signals
from mdistiller_norm.reproduce.estimate import clock
from mdistiller_norm.reproduce.execution import Execution, trained_record
from mdistiller_norm.reproduce.jobs import Job
from mdistiller_norm.reproduce.ledger import Ledger


def pending_jobs(jobs: Sequence[Job], ledger: Ledger) -> list[Job]:
    """The jobs that have to run: not in the ledger, or a teacher of such whose weights are not here."""
    missing = [job for job in jobs if job.seed not in ledger.of(job.identity)]
    needed = {job.teacher.key for job in missing if job.teacher}
    return [
        job
        for job in jobs
        if (job.cells and job in missing)
        or (job.key in needed and not (job.weights.is_file() and trained_record(job) is not None))
    ]


@dataclass
class Summary:
    """How a set of jobs ended.

    Attributes:
        done: finished.
        failed: with the reason.
        blocked: their teacher failed.
        left: not finished: time was up, or somebody stopped it or its teacher.
        signal: the number of the signal that stopped everything, or 0.
    """

    done: list[Job] = field(default_factory=list)
    failed: list[tuple[Job, str]] = field(default_factory=list)
    blocked: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0: all is done; 1: something failed; 3: something is left; 128 + the signal's number."""
        if self.signal:
            return 128 + self.signal
        return 1 if self.failed or self.blocked else 3 if self.left else 0


class Runner:
    """Runs jobs on this machine until all are finished, the deadline, SIGINT or SIGTERM.

    Args:
        todo: teachers before their students.
        folder: the ledger.
        jobs: how many at a time; on several GPUs they take turns.
        processes: of each job.
        deadline: ``time.monotonic()`` at which running jobs are told to save and stop.
    """

    def __init__(self, todo: Sequence[Job], folder: Path, *, jobs: int, processes: int, deadline: float) -> None:
        self.folder, self.jobs, self.processes, self.deadline = folder, jobs, processes, deadline
        self.summary, self._waiting, self._running = Summary(), list(todo), dict[int, Execution]()
        self._unfinished = {job.key for job in todo}
        self._failed, self._stopped, self._locked = (set[tuple[str, int]]() for _ in range(3))
        self._place = {job.key: f"[{i}/{len(todo)}]" for i, job in enumerate(todo, 1)}

    def run(self) -> Summary:
        """Run them; returns how they ended."""
        with stop_signals(self._note, (signal.SIGINT, signal.SIGTERM)):
            try:
                while self._running or (self._waiting and not self._stopping):
                    if self._stopping:
                        self._stop(in_time=not self.summary.signal)
                    self._collect()
                    if not self._stopping:
                        self._drop_students_without_teacher()
                        self._start()
                    time.sleep(0.1)
            except BaseException:
                self._stop(in_time=False)  # nobody would see how they end
                raise
        self.summary.left += self._waiting
        return self.summary

    def _stop(self, in_time: bool) -> None:
        for execution in self._running.values():
            execution.stop(in_time)

    def _note(self, signal_number: int) -> None:
        self.summary.signal = signal_number

    @property
    def _stopping(self) -> bool:
        return bool(self.summary.signal) or time.monotonic() >= self.deadline

    def _say(self, job: Job, what: str) -> None:
        print(f"{self._place[job.key]} {what}", flush=True)

    def _collect(self) -> None:
        """Take note of the jobs that have ended."""
        for slot, execution in list(self._running.items()):
            if (outcome := execution.poll()) == "running":
                continue
            del self._running[slot]
            job, took = execution.job, clock(time.monotonic() - execution.started)
            if outcome == "done":
                self.summary.done.append(job)
                self._unfinished.discard(job.key)
                how = f"done in {took}" if execution.ran else "was finished by another process"
                self._say(job, f"{how}: {job.name}")
            elif outcome == "failed":
                self.summary.failed.append((job, execution.error))
                self._failed.add(job.key)
                self._say(job, f"FAILED: {job.name}: {execution.error} (log: {execution.log})")
            else:
                self.summary.left.append(job)
                self._stopped.add(job.key)
                how = "stopped and saved" if outcome == "stopped" else "killed, it goes on from its last saved state"
                self._say(job, f"{how}: {job.name}")

    def _drop_students_without_teacher(self) -> None:
        for job in list(self._waiting):
            teacher = job.teacher.key if job.teacher else None
            if teacher in self._failed:
                self._waiting.remove(job)
                self.summary.blocked.append(job)
                self._say(job, f"not run, its teacher failed: {job.name}")
            elif teacher in self._stopped:  # by somebody else's signal
                self._waiting.remove(job)
                self.summary.left.append(job)
                self._say(job, f"not run, its teacher was stopped: {job.name}")

    def _start(self) -> None:
        """Start jobs in the slots that are free."""
        for job in list(self._waiting):
            free = sorted(set(range(self.jobs)) - self._running.keys())
            if not free:
                break
            if job.teacher and job.teacher.key in self._unfinished:
                continue
            environment = slot_environment(job.device, free[0], self.jobs, self.processes)
            execution = Execution(job, self.folder, self.processes, environment)
            if execution.start():
                self._waiting.remove(job)
                self._running[free[0]] = execution
                if execution.ran:
                    behind = f" from epoch {job.epochs_done + 1}" if job.epochs_done else ""
                    self._say(job, f"running{behind}: {job.name}")
            elif job.key not in self._locked:
                self._locked.add(job.key)
                self._say(job, f"another process is running it, waiting: {job.name}")
