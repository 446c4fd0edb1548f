"""One job in processes of its own: what fails is recorded, what is stopped goes on the next time."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import yaml

from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.logger import Record
from mdistiller_norm.engine.signals import STOP_SIGNALS
from mdistiller_norm.errors import DataError
from mdistiller_norm.files import PROJECT
from mdistiller_norm.reproduce.jobs import Job, config_path, identity
from mdistiller_norm.reproduce.ledger import add, failed_record, finished_record

# Seconds between SIGTERM and SIGKILL where time is up: training stops after its step and writes its state. torchrun
# gives its processes this time too, and itself needs some more to end after them.
GRACE, TORCHRUN_GRACE = 30.0, 40.0
_STOPPED = {code for number in STOP_SIGNALS for code in (-number, 128 + number)}
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")


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


class Execution:
    """One job, under a lock that lasts as long as this process or the training.

    Args:
        job: to run.
        folder: the ledger.
        processes: that share its batches on this machine, started by torchrun if there are several.
        environment: of the training, on top of this process's.
    """

    def __init__(
        self, job: Job, folder: Path, processes: int = 1, environment: Mapping[str, str] | None = None
    ) -> None:
        self.job, self.folder, self.processes, self.environment = job, folder, processes, environment or {}
        notes = job.folder.parent / ".reproduce"
        notes.mkdir(parents=True, exist_ok=True)
        self.log = notes / f"{job.folder.name}.log"
        self._lock_file = notes / f"{job.folder.name}.lock"
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping, self._kill_at = False, float("inf")
        self._log_start = 0
        self.started = time.monotonic()

    def start(self) -> bool:
        """Start training; False while another process has the lock."""
        self._lock = self._lock_file.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            return False
        except OSError:  # a file system without locks
            pass
        if settle(self.job, self.folder):  # by whoever had the lock before
            return True
        command = [sys.executable, str(PROJECT / "tools" / "train.py"), *self.job.arguments]
        if self.processes > 1:
            many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
            command[1:1] = many
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | dict(self.environment), start_new_session=True, pass_fds=[self._lock.fileno()],
            )  # fmt: skip
        return True

    def poll(self) -> str:
        """``running``, ``done``, ``failed``, ``stopped`` or ``killed``; the ledger is written when it ends."""
        if self._process:
            code = self._process.poll()
            if code is None:
                if time.monotonic() > self._kill_at:
                    self._process.kill()
                return "running"
            if code or not settle(self.job, self.folder):
                if self._stopping and code == -signal.SIGKILL:
                    return self._release("killed")
                if self._was_stopped(code):
                    return self._release("stopped")
                self._record_failure(code)
                return self._release("failed")
        return self._release("done")

    @property
    def ran(self) -> bool:
        """Whether a process was needed."""
        return self._process is not None

    def stop(self, in_time: bool = False) -> None:
        """Ask it to save and stop.

        Args:
            in_time: kill it where it does not within ``GRACE``. It saves after its step, or after an evaluation that is
                under way, which may take longer: then what was trained since the last state is lost.
        """
        if self._process and not self._stopping:
            self._stopping = True
            if in_time:
                self._kill_at = time.monotonic() + (GRACE if self.processes == 1 else TORCHRUN_GRACE)
            self._process.terminate()

    def _was_stopped(self, code: int) -> bool:
        # A torchrun that was told to stop ends with 1, as it does after an error.
        return code in _STOPPED or (self._stopping and self.processes > 1)

    @property
    def error(self) -> str:
        """The line that says why it failed: of several processes the first's, the others fail of its absence."""
        if self._process and self._process.returncode == 0:  # it said that it was done, and its folder does not
            try:
                finished_record(self.job.folder, self.job.config_file, self.job.smoke)
            except DataError as error:
                return str(error)
        lines = self._lines()
        first = next((line for line in lines if line.startswith("error: ")), "")
        exceptions = [line for line in lines if _EXCEPTION.match(line)]
        return first or (exceptions[0] if exceptions else lines[-1] if lines else "")

    def _lines(self) -> list[str]:
        """What this start of the job has printed."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def _record_failure(self, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        config = load_config(config_path(self.job.config_file), self.job.overrides)
        starter = "python" if self.processes == 1 else f"torchrun --standalone --nproc-per-node {self.processes}"
        record = failed_record(
            self.job.config_file, yaml.safe_load(dump(config.node)), self.job.seed,
            " ".join([starter, "tools/train.py", "--cfg", self.job.config_file, *self.job.overrides]),
            f"{self.error} ({how})", self._lines()[-20:], self.job.smoke,
        )  # fmt: skip
        add(record, self.folder)

    def _release(self, outcome: str) -> str:
        if self._lock:
            self._lock.close()
        return outcome
