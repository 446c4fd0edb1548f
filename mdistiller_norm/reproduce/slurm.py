"""Execution of jobs on a cluster through submitit: one Slurm job per run, resubmitted on preemption."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.errors import ConfigError, first_line, needs_extra
from mdistiller_norm.reproduce.plan import Job, JobKey
from mdistiller_norm.reproduce.runner import BLOCKED, DONE, FAILED, QUEUED, Execution


class ClusterTask:
    """The work of one cluster job: it runs one job and is saved and resubmitted on preemption."""

    def __init__(self, job: Job, folder: Path, processes: int) -> None:
        self.job, self.folder, self.processes = job, folder, processes
        self._execution: Execution | None = None

    def __call__(self) -> None:
        self._execution = Execution(self.job, self.folder, self.processes, {})
        while not self._execution.start():
            time.sleep(1)
        while not (outcome := self._execution.poll()):
            time.sleep(0.2)
        if outcome != DONE:  # Slurm must not start its students
            raise RuntimeError(self._execution.text(outcome))

    def checkpoint(self) -> Any:
        import submitit  # which calls this before it preempts the job

        if self._execution:
            self._execution.stop(kill=True)
            while not self._execution.poll():
                time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(
            ClusterTask(self.job, self.folder, self.processes)
        )


def submit(
    jobs: Sequence[Job], folder: Path, launcher: str, options: Sequence[str], processes: int
) -> dict[JobKey, str]:
    """Submit jobs to ``slurm`` with dependencies on their teachers, or run them by ``submitit-local``."""
    with needs_extra("slurm", "--launcher slurm"):
        import submitit
    outcomes, submitted = dict[JobKey, str](), dict[JobKey, Any]()
    parameters: dict[str, Any] = {"name": "mdistiller_norm", "timeout_min": 24 * 60}
    try:
        for name, _, value in (option.partition("=") for option in options):
            parameters[name] = yaml.safe_load(value)
        extra = parameters.get("slurm_additional_parameters") or {}
        logs, cluster = folder.parent / ".submitit" / "%j", launcher.removeprefix("submitit-")
        executor = submitit.AutoExecutor(logs, cluster=cluster)
        executor.update_parameters(**parameters)
        for job in jobs:
            teacher = submitted.get(job.teacher.key) if job.teacher else None
            if cluster == "slurm":
                after = {"dependency": f"afterok:{teacher.job_id}"} if teacher else {}
                needs = extra | {"kill_on_invalid_dep": "yes"} | after
                executor.update_parameters(slurm_additional_parameters=needs)
            elif teacher and teacher.exception():  # waits for the teacher
                outcomes[job.key] = BLOCKED
                continue
            submitted[job.key] = executor.submit(ClusterTask(job, folder, processes))
            print(f"submitted as {submitted[job.key].job_id}: {job.name}", flush=True)
    except (OSError, RuntimeError, NameError, TypeError, ValueError, yaml.YAMLError) as error:
        done = f"{len(submitted)} jobs submitted"
        raise ConfigError(f"--launcher {launcher}: {first_line(error)} ({done})") from error
    for key, task in submitted.items():
        outcomes[key] = QUEUED if cluster == "slurm" else FAILED if task.exception() else DONE
    return outcomes
