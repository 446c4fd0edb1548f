"""Several trials of one config at once, each with a run folder of its own. ``SOLVER.TRIALS_MODE`` says how:

- ``processes``: the seeds SEED, SEED + 1, ... in a process each. A trial is exactly the run that its ``SEED`` alone
  would have given with the same number of threads: nothing is shared but the files of the teacher cache, whose rows
  never change. On the CPU each trial gets its share of the cores: networks of CIFAR's size use one core better than
  two. With several GPUs the trials take turns on them.
- ``lockstep``: one process, in which the teacher sees every batch once for all. The trials share the order and the
  augmentation of the data, those of SEED, and differ in the seed of their initial weights: SEED, SEED + 1, ... A trial
  is exactly the run that ``SOLVER.INIT_SEED`` alone would have given.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mdistiller_norm.build import build_device, fastest, initial_seed
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.lockstep import Lockstep, fit_together
from mdistiller_norm.engine.runtime import slot_environment
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.trainer import Interrupted, stop_signals
from mdistiller_norm.errors import ConfigError, UserError
from mdistiller_norm.run import begin, build_runs, finish
from mdistiller_norm.run_folder import run_folder

TOOL = Path(__file__).resolve().parents[1] / "tools" / "train.py"


def trial_overrides(config: Config, trial: int) -> list[str]:
    """What makes the given config (of several trials) that of one of them, counted from 0."""
    cfg, name = config.node, run_folder(config).name
    if cfg.SOLVER.TRIALS_MODE == "lockstep":
        seed = initial_seed(cfg) + trial
        return ["SOLVER.TRIALS=1", f"SOLVER.INIT_SEED={seed}", f"EXPERIMENT.NAME={name},init{seed}"]
    seed = cfg.SEED + trial
    return ["SOLVER.TRIALS=1", f"SEED={seed}", f"EXPERIMENT.NAME={name},seed{seed}"]


def _summary(folders: Sequence[Path]) -> str:
    results: list[dict[str, Any]] = [json.loads((folder / "result.json").read_text()) for folder in folders]
    lines = []
    for which in ("last", "best"):
        values = [result[which]["top1"] for result in results]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        listed = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"{which} top-1 {statistics.mean(values):.2f}{spread} (n={len(values)}: {listed})")
    return "\n".join(lines)


def train_trials(cfg_file: str, overrides: Sequence[str], resume: bool, command: Sequence[str] = ()) -> None:
    """Run ``SOLVER.TRIALS`` trials of a config and print the mean and the standard deviation.

    Args:
        cfg_file: the config.
        overrides: of the command line.
        resume: each goes on where it stopped.
        command: the words of the command line, for the records of trials in lockstep.

    Raises:
        UserError: a trial failed; the others were finished.
        ConfigError: this is one of several processes of torchrun.
        Interrupted: on SIGINT, SIGTERM or SIGUSR1, after every trial saved its state.
    """
    if distributed.wanted().world > 1:
        raise ConfigError("SOLVER.TRIALS makes the processes that it needs itself: start it without torchrun")
    config = load_config(cfg_file, overrides)
    names = [trial_overrides(config, trial) for trial in range(config.node.SOLVER.TRIALS)]
    configs = [load_config(cfg_file, [*overrides, *own]) for own in names]
    if config.node.SOLVER.TRIALS_MODE == "lockstep":
        failed = _in_lockstep(configs, resume, shlex.join(command))
    else:
        failed = _in_processes(config, cfg_file, overrides, names, resume)
    if failed:
        folders = ", ".join(str(run_folder(configs[trial])) for trial in sorted(failed))
        raise UserError(f"the trials in {folders} failed (see above), the others are finished: --resume goes on")
    print(_summary([run_folder(own) for own in configs]))


def _in_lockstep(configs: Sequence[Config], resume: bool, command: str) -> list[int]:
    """Train the trials in this process; returns the numbers of those that failed."""
    cfg = configs[0].node
    runs = build_runs(configs, resume, command)

    def together(steps: Sequence[TrainStep]) -> Callable[..., None]:
        return fastest(cfg, Lockstep(steps), steps[0], runs[0].trainer.log.line)

    try:
        for run in runs:
            begin(run)
        errors = fit_together([run.trainer for run in runs], together)
        for run in runs:
            if run.trainer not in errors:
                finish(run)
    finally:
        for run in runs:
            run.trainer.log.close()
    return [number for number, run in enumerate(runs) if run.trainer in errors]


def _in_processes(
    config: Config, cfg_file: str, overrides: Sequence[str], names: Sequence[list[str]], resume: bool
) -> list[int]:
    """Train each trial in a process of its own; returns the numbers of those that failed."""
    trials, cores = config.node.SOLVER.TRIALS, os.cpu_count() or 1
    on_cpu = build_device(config.node).type == "cpu"
    at_once = min(trials, cores) if on_cpu else trials
    waiting = list(enumerate(names))
    running: dict[int, subprocess.Popen[bytes]] = {}
    failed: list[int] = []
    stopped: list[int] = []

    def stop(number: int) -> None:
        stopped.append(number)
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    with stop_signals(stop):
        while running or (waiting and not stopped):
            while waiting and len(running) < at_once and not stopped:
                trial, own = waiting.pop(0)
                command = [sys.executable, str(TOOL), "--cfg", cfg_file, *(["--resume"] if resume else [])]
                # A session of its own: Ctrl-C reaches it through us, once.
                running[trial] = subprocess.Popen(
                    [*command, *overrides, *own],
                    env=os.environ | slot_environment(config.node.DEVICE, trial, at_once),
                    start_new_session=True,
                )
                if stopped:  # meanwhile, when this one was not known yet
                    running[trial].send_signal(signal.SIGTERM)
            for trial in [trial for trial, process in running.items() if process.poll() is not None]:
                if running.pop(trial).returncode and not stopped:
                    failed.append(trial)
            time.sleep(0.1)
    if stopped:
        raise Interrupted(stopped[0])
    return failed
