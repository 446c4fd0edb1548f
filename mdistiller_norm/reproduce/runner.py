"""Runs jobs, each in a process of its own: what fails is recorded, what is stopped goes on the next time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import torch
import yaml

from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.checkpoint import PROJECT
from mdistiller_norm.engine.logger import Record
from mdistiller_norm.errors import DataError
from mdistiller_norm.reproduce.estimate import clock
from mdistiller_norm.reproduce.jobs import Job, config_path, identity
from mdistiller_norm.reproduce.ledger import Ledger, add, failed_record, finished_record

# Seconds between SIGTERM and SIGKILL: training stops after its step and writes its state.
GRACE = 30.0
_STOPPED = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}


def trained_record(job: Job) -> Record | None:
    """The record of a job's run folder, if the run is finished there."""
    if not (job.folder / "result.json").is_file():
        return None
    try:
        record = finished_record(job.folder, job.config_file, job.smoke)
    except DataError:
        return None  # of fewer epochs, or broken: the training tool decides what to do with it
    return record if (identity(record["config"]), record["seed"]) == job.key else None


def settle(job: Job, folder: Path) -> bool:
    """Take a job's run into the ledger if it is finished; returns whether it is."""
    record = trained_record(job)
    if record:
        add(record, folder)
    return record is not None


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


class Execution:
    """One job in a process of its own, under a lock that lasts as long as this process or that one.

    Args:
        job: to run.
        folder: the ledger.
        device: overrides ``DEVICE`` if not empty.
        threads: of the processor, 0 for the default.
    """

    def __init__(self, job: Job, folder: Path, device: str = "", threads: int = 0) -> None:
        self.job, self.folder, self.device, self.threads = job, folder, device, threads
        notes = job.folder.parent / ".reproduce"
        notes.mkdir(parents=True, exist_ok=True)
        self.log = notes / f"{job.folder.name}.log"
        self._lock_file = notes / f"{job.folder.name}.lock"
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stop_at = 0.0
        self.started = time.monotonic()

    def start(self) -> bool:
        """Start the process; False while another one has the lock."""
        self._lock = self._lock_file.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            return False
        if settle(self.job, self.folder):  # by whoever had the lock before
            return True
        command = [sys.executable, str(PROJECT / "tools" / "train.py"), *self.job.arguments]
        command += [f"DEVICE={self.device}"] if self.device else []
        environment = os.environ | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, pass_fds=[self._lock.fileno()],
            )  # fmt: skip
        return True

    def poll(self) -> str:
        """``running``, ``done``, ``failed`` or ``stopped``; the ledger is written when it ends."""
        if self._process:
            code = self._process.poll()
            if code is None:
                if self._stop_at and time.monotonic() > self._stop_at + GRACE:
                    self._process.kill()
                return "running"
            if code or not settle(self.job, self.folder):
                if code in _STOPPED or (self._stop_at and code == -signal.SIGKILL):
                    return self._release("stopped")
                self._record_failure(code)
                return self._release("failed")
        return self._release("done")

    @property
    def ran(self) -> bool:
        """Whether a process was needed."""
        return self._process is not None

    def stop(self) -> None:
        """Ask it to save and stop."""
        if self._process and not self._stop_at:
            self._stop_at = time.monotonic()
            self._process.terminate()

    @property
    def error(self) -> str:
        """The line that says why it failed."""
        lines = self._last_lines()
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")

    def _last_lines(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-20:]

    def _record_failure(self, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        config = load_config(config_path(self.job.config_file), self.job.overrides)
        record = failed_record(
            self.job.config_file, yaml.safe_load(dump(config.node)), self.job.seed,
            " ".join(["python tools/train.py", "--cfg", self.job.config_file, *self.job.overrides]),
            f"{self.error} ({how})", self._last_lines(), self.job.smoke,
        )  # fmt: skip
        add(record, self.folder)

    def _release(self, outcome: str) -> str:
        if self._lock:
            self._lock.close()
        return outcome


@dataclass
class Summary:
    """How a set of jobs ended.

    Attributes:
        done: finished.
        failed: with the reason.
        blocked: their teacher failed.
        left: not finished for lack of time.
        signal: the number of the signal that stopped everything, or 0.
    """

    done: list[Job] = field(default_factory=list)
    failed: list[tuple[Job, str]] = field(default_factory=list)
    blocked: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    signal: int = 0

    @property
    def exit_code(self) -> int:
        """0: all is done; 1: something failed; 3: time was up; 128 + the signal's number."""
        if self.signal:
            return 128 + self.signal
        return 1 if self.failed or self.blocked else 3 if self.left else 0


def run_jobs(
    todo: Sequence[Job], folder: Path, *, jobs: int = 1, deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> Summary:  # fmt: skip
    """Run jobs on this machine until all are finished, the deadline, SIGINT or SIGTERM.

    Args:
        todo: teachers before their students.
        folder: the ledger.
        jobs: how many at a time; on several GPUs they take turns.
        deadline: ``time.monotonic()`` at which running jobs are told to save and stop.
        say: prints a line.
    """
    summary, waiting, running = Summary(), list(todo), list[tuple[int, Execution]]()
    unfinished, bad, locked = {job.key for job in todo}, set[tuple[str, int]](), set[tuple[str, int]]()
    gpus = torch.cuda.device_count()
    threads = max((os.cpu_count() or 1) // jobs, 1) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else 0
    place = {job.key: f"[{i}/{len(todo)}]" for i, job in enumerate(todo, 1)}
    with _signals(summary):
        while waiting or running:
            if summary.signal or time.monotonic() >= deadline:
                for _, execution in running:
                    execution.stop()
                if not running:
                    break
            for slot, execution in list(running):
                if (outcome := execution.poll()) == "running":
                    continue
                running.remove((slot, execution))
                job, took = execution.job, clock(time.monotonic() - execution.started)
                if outcome == "done":
                    summary.done.append(job)
                    unfinished.discard(job.key)
                    how = f"done in {took}" if execution.ran else "was finished by another process"
                    say(f"{place[job.key]} {how}: {job.name}")
                elif outcome == "failed":
                    summary.failed.append((job, execution.error))
                    bad.add(job.key)
                    say(f"{place[job.key]} FAILED: {job.name}: {execution.error} (log: {execution.log})")
                else:
                    summary.left.append(job)
                    say(f"{place[job.key]} stopped and saved: {job.name}")
            stopping = summary.signal or time.monotonic() >= deadline
            for job in [] if stopping else list(waiting):
                if job.teacher and job.teacher.key in bad:
                    waiting.remove(job)
                    summary.blocked.append(job)
                    say(f"{place[job.key]} not run, its teacher failed: {job.name}")
                elif len(running) < jobs and (not job.teacher or job.teacher.key not in unfinished):
                    slot = min(set(range(jobs)) - {number for number, _ in running})
                    device = f"cuda:{slot % gpus}" if gpus > 1 and jobs > 1 else ""
                    execution = Execution(job, folder, device, threads)
                    if execution.start():
                        waiting.remove(job)
                        running.append((slot, execution))
                        if execution.ran:
                            behind = f" from epoch {job.epochs_done + 1}" if job.epochs_done else ""
                            say(f"{place[job.key]} running{behind}: {job.name}")
                    elif job.key not in locked:
                        locked.add(job.key)
                        say(f"{place[job.key]} another process is running it, waiting: {job.name}")
            time.sleep(0.1)
    summary.left += waiting
    return summary


@contextmanager
def _signals(summary: Summary) -> Iterator[None]:
    """Note the first SIGINT or SIGTERM in the summary instead of dying of it; a second one acts at once."""
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        summary.signal = number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
