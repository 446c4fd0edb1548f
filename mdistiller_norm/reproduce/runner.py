"""Execution of jobs on this machine: several at a time, teachers first, until all have ended or a signal arrives."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdistiller_norm.engine.runtime import STOP_SIGNALS, slot_environment, stop_signals
from mdistiller_norm.errors import DataError
from mdistiller_norm.files import open_lock, python_arguments
from mdistiller_norm.reproduce.ledger import (
    Entry,
    Ledger,
    failed_record,
    finished_run,
    write_record,
)
from mdistiller_norm.reproduce.plan import Job, JobKey, duration

GRACE = 35.0  # seconds between SIGTERM and SIGKILL at the deadline; torchrun's are 30
PROGRESS = 60.0  # seconds between two lines about a running job
DONE, FAILED, BLOCKED, STOPPED, QUEUED = "done", "failed", "blocked", "stopped", "queued"
_STOP_CODES = {code for number in STOP_SIGNALS for code in (-number, 128 + number)}
_EXCEPTION = re.compile(r"error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")


def trained(job: Job) -> Entry | None:
    """Return the record of a job's run folder, or None if it has not finished with this teacher."""
    try:
        run = finished_run(job.folder, job.config_file, job.smoke)
    except DataError:
        return None
    same_teacher = run.teacher_hash.startswith(job.teacher_hash())
    return run if run.key == job.key and same_teacher else None


def pending_jobs(jobs: Sequence[Job], ledger: Ledger) -> list[Job]:
    """Return the jobs that are missing in the ledger, and the teachers of these whose weights are missing."""
    done = {job.key for job in jobs if ledger.has(*job.key, job.teacher_hash())}
    teachers = {
        job.teacher.key: job.teacher for job in jobs if job.teacher and job.key not in done
    }
    pending = {
        key for key, job in teachers.items() if not (job.weights.is_file() and trained(job))
    }
    pending |= {job.key for job in jobs if job.cells} - done
    return [job for job in jobs if job.key in pending]


class Execution:
    """A job in a child process (torchrun for several processes), under a lock that is held until the process ends."""

    def __init__(
        self, job: Job, folder: Path, processes: int, environment: Mapping[str, str]
    ) -> None:
        self.job, self.folder = job, folder
        self.processes, self.environment = processes, environment
        logs = job.folder.parent / ".reproduce"
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{job.folder.name}.log"
        self.started = self.reported = time.monotonic()
        # None if another process finished the job.
        self.process: subprocess.Popen[bytes] | None = None
        self.run: Entry | None = None
        self._error = ""
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        train = [*python_arguments("train"), "--cfg", job.config_file, *job.overrides]
        self._arguments = [*launcher, *train] if processes > 1 else train
        self._lock = open_lock(logs / f"{job.folder.name}.lock")
        self._stopping, self._kill_at = False, float("inf")

    def start(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # another process holds the lock
        if self.job.weights.is_file() and self._add_to_ledger():
            return True
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self._arguments, "--resume"],
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
        if (code := self.process.poll() if self.process else 0) is None:
            if self.process and time.monotonic() > self._kill_at:
                self.process.kill()
            return ""
        outcome = DONE
        if self.process and (code or not self._add_to_ledger()):
            # A torchrun that was stopped exits with 1, as after an error.
            stopped = self._stopping and (self.processes > 1 or code == -signal.SIGKILL)
            outcome = STOPPED if stopped or code in _STOP_CODES else FAILED
        if outcome == FAILED:
            self._record_failure(code)
        self._lock.close()
        return outcome

    def stop(self, kill: bool = False) -> None:
        if self.process and not self._stopping:
            self._stopping = True
            if kill:
                self._kill_at = time.monotonic() + GRACE
            self.process.terminate()

    def text(self, outcome: str) -> str:
        if outcome == DONE and self.run:
            last, best = (self.run.record[which]["top1"] for which in ("last", "best"))
            took = f"done in {duration(time.monotonic() - self.started)}"
            state = took if self.process else "finished by another process"
            return f"{state}, last top-1 {last:.2f}, best top-1 {best:.2f}"
        if outcome == FAILED:
            return f"FAILED, {self._error} (log: {self.log})"
        return f"stopped, {self.job.progress}" if outcome else self.job.progress

    def _add_to_ledger(self) -> bool:
        self.run = trained(self.job)
        if self.run:
            write_record(self.run.record, self.folder)
        return self.run is not None

    def _record_failure(self, code: int) -> None:
        job, output = self.job, self.log.read_text(errors="replace")
        lines = [line for line in output.splitlines() if line.strip()]
        # Of several processes, the first one's message: the others fail as a consequence.
        errors = sorted(filter(_EXCEPTION.match, lines), key=lambda line: line[:6] != "error:")
        if code == 0:
            errors = [f"{job.folder}: result.json or metrics.jsonl is damaged"]
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._error = f"{(errors or lines[-1:] or [''])[0]} ({reason})"
        record = failed_record(
            self._error,
            lines[-20:],
            job.config,
            command=" ".join(["python", *self._arguments]),
            smoke=job.smoke,
            config_file=job.config_file,
            seed=job.key[1],
        )
        write_record(record, self.folder)


class Runner:
    """Runs jobs, teachers before their students; ``slots`` of them at a time are distributed over the GPUs."""

    def __init__(self, jobs: Sequence[Job], folder: Path, slots: int, processes: int) -> None:
        self.folder, self.slots, self.processes = folder, slots, processes
        self.signals: list[int] = []
        self._outcomes = {job.key: "" for job in jobs}  # empty until the job has ended
        self._waiting, self._running = list(jobs), dict[int, Execution]()
        self._number = {job.key: f"{i}/{len(jobs)}" for i, job in enumerate(jobs, 1)}
        self._locked: set[JobKey] = set()

    def run(self, deadline: float) -> dict[JobKey, str]:
        """Run until all jobs have ended, ``time.monotonic()`` reaches the deadline, or SIGINT or SIGTERM arrives."""
        stopping = False
        with stop_signals(self.signals.append, (signal.SIGINT, signal.SIGTERM)):
            try:
                while self._running or (self._waiting and not stopping):
                    stopping = bool(self.signals) or time.monotonic() >= deadline
                    for slot, execution in list(self._running.items()):
                        if stopping:
                            execution.stop(kill=not self.signals)
                        self._poll(slot, execution)
                    for job in [] if stopping else list(self._waiting):
                        self._start(job)
                    time.sleep(0.1)
            finally:
                for execution in self._running.values():
                    execution.stop()
        return {key: outcome or STOPPED for key, outcome in self._outcomes.items()}

    def _print(self, job: Job, text: str) -> None:
        print(f"{self._number[job.key]} {job.name}: {text}", flush=True)

    def _poll(self, slot: int, execution: Execution) -> None:
        if outcome := execution.poll():
            del self._running[slot]
            self._outcomes[execution.job.key] = outcome
        if outcome or time.monotonic() > execution.reported + PROGRESS:
            execution.reported = time.monotonic()
            self._print(execution.job, execution.text(outcome))

    def _start(self, job: Job) -> None:
        outcome = self._outcomes.get(job.teacher.key, DONE) if job.teacher else DONE
        free = [slot for slot in range(self.slots) if slot not in self._running]
        if outcome not in (DONE, ""):
            self._waiting.remove(job)
            self._outcomes[job.key] = BLOCKED
            self._print(job, f"not started, its teacher {outcome}")
        elif free and outcome:
            environment = slot_environment(
                job.config["DEVICE"], free[0], self.slots, self.processes
            )
            execution = Execution(job, self.folder, self.processes, environment)
            if execution.start():
                self._waiting.remove(job)
                self._running[free[0]] = execution
                self._print(job, f"started, {job.progress}")
            elif job.key not in self._locked:
                self._locked.add(job.key)
                self._print(job, "waiting, another process is running it")
