"""Execution of jobs on this machine: several at a time, teachers first, until all are finished or a signal arrives."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import yaml

from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.runtime import slot_environment
from mdistiller_norm.engine.signals import STOP_SIGNALS, stop_signals
from mdistiller_norm.errors import DataError
from mdistiller_norm.files import find_config
from mdistiller_norm.program import python_arguments
from mdistiller_norm.reproduce.ledger import Ledger, Record, add, failed_record, finished_record, identity
from mdistiller_norm.reproduce.plan import Job, JobKey, duration

# Seconds between SIGTERM and SIGKILL at the deadline: a run saves its state after its step. torchrun gives its
# processes the same time and needs a few more seconds to exit.
GRACE, TORCHRUN_GRACE = 30.0, 40.0
DONE, FAILED, BLOCKED, STOPPED, KILLED, QUEUED = "done", "failed", "blocked", "stopped", "killed", "queued"
_STOP_CODES = {code for number in STOP_SIGNALS for code in (-number, 128 + number)}
_EXCEPTION = re.compile(r"error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")
Outcomes = dict[JobKey, str]


def trained_record(job: Job) -> Record | None:
    """Return the record of a job's run folder, or None if the run has not finished there."""
    try:
        record = finished_record(job.folder, job.config_file, job.smoke)
    except DataError:
        return None
    return record if (identity(record["config"]), record["seed"]) == job.key else None


def pending_jobs(jobs: Sequence[Job], ledger: Ledger) -> list[Job]:
    """Return the jobs that are missing in the ledger, and the teachers of these whose weights are missing."""
    missing = {job.key for job in jobs if job.key[1] not in ledger.of(job.key[0])}
    needed = {job.teacher.key for job in jobs if job.teacher and job.key in missing}
    pending = {job.key for job in jobs if job.cells} & missing
    pending |= {job.key for job in jobs if job.key in needed and not (job.weights.is_file() and trained_record(job))}
    return [job for job in jobs if job.key in pending]


class Execution:
    """A job in a child process, started by torchrun if it has several ones, under a lock until that process ends."""

    def __init__(
        self, job: Job, folder: Path, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        self.job, self.folder, self.processes, self.environment = job, folder, processes, environment or {}
        logs = job.folder.parent / ".reproduce"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{job.folder.name}.log"
        self.started = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None  # None if another process finished the job
        self._lock: IO[str] = (logs / f"{job.folder.name}.lock").open("w")
        self._stopping, self._kill_at = False, float("inf")

    def start(self) -> bool:
        """Start the training; returns False while another process holds the lock."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if self._add_to_ledger():
            return True
        command = [sys.executable, *python_arguments("train"), *self.job.arguments]
        if self.processes > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment),
                start_new_session=True,
                pass_fds=[self._lock.fileno()],
            )
        return True

    def poll(self) -> str:
        """Return the outcome, or an empty string while it is running; writes the ledger at the end."""
        code = self.process.poll() if self.process else 0
        if code is None:
            if self.process and time.monotonic() > self._kill_at:
                self.process.kill()
            return ""
        outcome = DONE
        if self.process and (code or not self._add_to_ledger()):
            # A torchrun that was stopped exits with 1, as after an error.
            stopped = code in _STOP_CODES or (self._stopping and self.processes > 1)
            outcome = KILLED if self._stopping and code == -signal.SIGKILL else STOPPED if stopped else FAILED
        if outcome == FAILED:
            self._record_failure(code)
        self._lock.close()
        return outcome

    def stop(self, kill: bool = False) -> None:
        """Send SIGTERM; with ``kill``, SIGKILL follows after a grace period, for example in a long evaluation."""
        if self.process and not self._stopping:
            self._stopping = True
            if kill:
                self._kill_at = time.monotonic() + (GRACE if self.processes == 1 else TORCHRUN_GRACE)
            self.process.terminate()

    @property
    def error(self) -> str:
        """The error message: of several processes the first one's, because the others fail as a consequence."""
        if self.process and self.process.returncode == 0:  # the training succeeded, but its files are damaged
            try:
                finished_record(self.job.folder)
            except DataError as error:
                return str(error)
        lines = self._output()
        errors = sorted(filter(_EXCEPTION.match, lines), key=lambda line: not line.startswith("error: "))
        return (errors or lines[-1:] or [""])[0]

    def _output(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    def _add_to_ledger(self) -> bool:
        record = trained_record(self.job)
        if record:
            add(record, self.folder)
        return record is not None

    def _record_failure(self, code: int) -> None:
        job = self.job
        starter = "python" if self.processes == 1 else f"torchrun --standalone --nproc-per-node {self.processes}"
        words = [starter, *python_arguments("train"), "--cfg", job.config_file, *job.overrides]
        head = {"smoke": job.smoke, "config_file": job.config_file, "seed": job.key[1], "command": " ".join(words)}
        config = yaml.safe_load(dump(load_config(find_config(job.config_file), job.overrides).node))
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        add(failed_record(head, config, f"{self.error} ({how})", self._output()[-20:]), self.folder)


class Runner:
    """Runs jobs on this machine until all are finished, the deadline is reached, or SIGINT or SIGTERM arrives.

    Args:
        jobs: teachers before their students.
        folder: folder of the ledger.
        slots: number of jobs at a time; they are distributed over the GPUs.
        processes: number of processes of each job.
        deadline: ``time.monotonic()`` at which running jobs are stopped.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, slots: int, processes: int, deadline: float) -> None:
        self.folder, self.slots, self.processes, self.deadline = folder, slots, processes, deadline
        self.outcomes: Outcomes = {}
        self.signal = 0
        self._waiting, self._running = list(jobs), dict[int, Execution]()
        self._number = {job.key: f"[{i}/{len(jobs)}]" for i, job in enumerate(jobs, 1)}
        self._locked: set[JobKey] = set()

    def run(self) -> Outcomes:
        """Run the jobs and return the outcomes of those that were started or blocked by a failed teacher."""
        with stop_signals(self._request_stop, (signal.SIGINT, signal.SIGTERM)):
            try:
                while self._running or (self._waiting and not self._stopping):
                    if self._stopping:
                        self._stop_all(kill=not self.signal)
                    self._collect()
                    if not self._stopping:
                        self._start_jobs()
                    time.sleep(0.1)
            except BaseException:
                self._stop_all(kill=False)
                raise
        return self.outcomes

    def _request_stop(self, signal_number: int) -> None:
        self.signal = signal_number

    @property
    def _stopping(self) -> bool:
        return bool(self.signal) or time.monotonic() >= self.deadline

    def _stop_all(self, kill: bool) -> None:
        for execution in self._running.values():
            execution.stop(kill)

    def _print(self, job: Job, text: str) -> None:
        print(f"{self._number[job.key]} {text}: {job.name}", flush=True)

    def _collect(self) -> None:
        """Process the jobs that have ended."""
        for slot, execution in list(self._running.items()):
            if not (outcome := execution.poll()):
                continue
            del self._running[slot]
            self.outcomes[execution.job.key] = outcome
            took = f"done in {duration(time.monotonic() - execution.started)}"
            texts = {
                DONE: took if execution.process else "finished by another process",
                FAILED: f"FAILED with {execution.error!r} (log: {execution.log})" if outcome == FAILED else "",
                STOPPED: "stopped and saved",
                KILLED: "killed, will resume from its last saved state",
            }
            self._print(execution.job, texts[outcome])

    def _start_jobs(self) -> None:
        for job in list(self._waiting):
            teacher = self.outcomes.get(job.teacher.key, "") if job.teacher else DONE
            if teacher not in ("", DONE):
                self._waiting.remove(job)
                self.outcomes[job.key] = BLOCKED if teacher == FAILED else STOPPED
                self._print(job, f"not started, its teacher {'failed' if teacher == FAILED else 'was stopped'}")
            elif teacher == DONE or (job.teacher and job.teacher.key not in self._unfinished()):
                free = [slot for slot in range(self.slots) if slot not in self._running]
                if free:
                    self._start(job, free[0])

    def _unfinished(self) -> set[JobKey]:
        return {job.key for job in (*self._waiting, *(execution.job for execution in self._running.values()))}

    def _start(self, job: Job, slot: int) -> None:
        environment = slot_environment(job.config["DEVICE"], slot, self.slots, self.processes)
        execution = Execution(job, self.folder, self.processes, environment)
        if execution.start():
            self._waiting.remove(job)
            self._running[slot] = execution
            if execution.process:
                self._print(job, f"resuming at epoch {job.epochs_done + 1}" if job.epochs_done else "running")
        elif job.key not in self._locked:
            self._locked.add(job.key)
            self._print(job, "waiting, another process is running it")
