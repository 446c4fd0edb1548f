"""Runs jobs on a cluster through submitit: one Slurm job a run, teachers first, requeued on preemption."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.reproduce.execution import Execution
from mdistiller_norm.reproduce.jobs import Job
from mdistiller_norm.reproduce.runner import Summary


class Task:
    """What a cluster job does: one run; told to make room, it saves and queues itself again."""

    def __init__(self, job: Job, folder: Path, processes: int) -> None:
        self.job, self.folder, self.processes = job, folder, processes
        self._execution: Execution | None = None

    def __call__(self) -> None:
        """Run the job to its end.

        Raises:
            RuntimeError: it failed or was stopped: a failed cluster job, so that Slurm does not start the students of a
                teacher that is not finished.
        """
        self._execution = Execution(self.job, self.folder, self.processes)
        while not self._execution.start():
            time.sleep(1)
        while (outcome := self._execution.poll()) == "running":
            time.sleep(0.2)
        if outcome != "done":
            raise RuntimeError(f"{outcome}: {self._execution.error}")

    def checkpoint(self) -> Any:
        """Called by submitit before the job is taken off its machine."""
        import submitit

        if self._execution:
            self._execution.stop(in_time=True)
            while self._execution.poll() == "running":
                time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(Task(self.job, self.folder, self.processes))


def launch(
    todo: Sequence[Job], folder: Path, *, cluster: str, options: Mapping[str, Any], notes: Path, processes: int
) -> Summary:
    """Submit every job, students with a dependency on their teacher.

    Args:
        todo: teachers before their students.
        folder: the ledger, on a file system that the cluster shares.
        cluster: ``slurm``, or ``local`` for processes of this machine, which this call waits for.
        options: of submitit's ``AutoExecutor.update_parameters`` (``slurm_partition``, ``timeout_min``, ...).
        notes: folder for submitit's own files.
        processes: of each job, on one machine (``gpus_per_node`` must give them their GPUs).

    Returns:
        On Slurm all jobs are ``left``: they are queued, not finished.

    Raises:
        ConfigError: submitit is not installed, Slurm is not on this machine, or an option or a job is refused.
    """
    if not importlib.util.find_spec("submitit"):
        raise ConfigError("--launcher slurm needs submitit: python -m pip install submitit")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=str(notes / "%j"), cluster=cluster)
        defaults = {"name": "mdistiller_norm", "timeout_min": 24 * 60}
        executor.update_parameters(**defaults | dict(options))
        asked = dict(options.get("slurm_additional_parameters") or {})
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(f"submitit cannot use {cluster} ({first_line(error)})") from error
    summary, submitted = Summary(), dict[tuple[str, int], Any]()
    for job in todo:
        teacher = submitted.get(job.teacher.key) if job.teacher else None
        if cluster == "slurm":
            after = {"dependency": f"afterok:{teacher.job_id}", "kill_on_invalid_dep": "yes"} if teacher else {}
            executor.update_parameters(slurm_additional_parameters=asked | after)
        elif teacher and teacher.exception():  # waits for it
            summary.blocked.append(job)
            print(f"not run, its teacher failed: {job.name}", flush=True)
            continue
        try:
            submitted[job.key] = executor.submit(Task(job, folder, processes))
        except (OSError, RuntimeError, TypeError, ValueError) as error:  # what sbatch says is a RuntimeError
            raise ConfigError(
                f"{job.name} cannot be submitted ({first_line(error)}); jobs before it: {len(submitted)}"
            ) from error
        print(f"submitted as {submitted[job.key].job_id}: {job.name}", flush=True)
    if cluster == "slurm":
        summary.left = list(todo)
        return summary
    for job in todo:
        if job.key not in submitted:
            continue
        if failure := submitted[job.key].exception():
            summary.failed.append((job, str(failure).strip().splitlines()[-1]))
        else:
            summary.done.append(job)
    return summary
