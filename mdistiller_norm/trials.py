"""Several trials of one config at once: a process each, their own seeds and run folders, the teacher cache shared.

A trial is exactly the run that ``SEED`` alone would have given with the same number of threads: nothing is shared but
the files of the teacher cache, whose rows never change. On the CPU each trial gets its share of the cores: networks of
CIFAR's size use one core better than two, so trials side by side finish earlier than one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mdistiller_norm.builders import build_device, run_folder
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.engine.trainer import Interrupted
from mdistiller_norm.errors import UserError

TOOL = Path(__file__).resolve().parents[1] / "tools" / "train.py"


def trial_overrides(config: Config, trial: int) -> list[str]:
    """What makes the given config (of several trials) that of one of them, counted from 0."""
    cfg = config.node
    seed = cfg.SEED + trial
    name = run_folder(config).name
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


def train_trials(cfg_file: str, overrides: Sequence[str], resume: bool) -> None:
    """Run ``SOLVER.TRIALS`` trials with the seeds SEED, SEED + 1, ... and print the mean and the standard deviation.

    Args:
        cfg_file: the config.
        overrides: of the command line.
        resume: each goes on where it stopped.

    Raises:
        UserError: a trial failed; the others were finished.
        Interrupted: on SIGINT or SIGTERM, after every trial saved its state.
    """
    config = load_config(cfg_file, overrides)
    trials, cores = config.node.SOLVER.TRIALS, os.cpu_count() or 1
    on_cpu = build_device(config.node).type == "cpu"
    at_once = min(trials, cores) if on_cpu else trials
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // at_once))
    waiting = [(trial, trial_overrides(config, trial)) for trial in range(trials)]
    folders = [run_folder(load_config(cfg_file, [*overrides, *own])) for _, own in waiting]
    running: dict[int, subprocess.Popen[bytes]] = {}
    failed: list[int] = []
    stopped = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = number
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            while waiting and len(running) < at_once and not stopped:
                trial, own = waiting.pop(0)
                command = [sys.executable, str(TOOL), "--cfg", cfg_file, *(["--resume"] if resume else [])]
                # A session of its own: Ctrl-C reaches it through us, once.
                running[trial] = subprocess.Popen(
                    [*command, *overrides, *own],
                    env=os.environ | {"OMP_NUM_THREADS": threads},
                    start_new_session=True,
                )
            for trial in [trial for trial, process in running.items() if process.poll() is not None]:
                if running.pop(trial).returncode and not stopped:
                    failed.append(trial)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise Interrupted(stopped)
    if failed:
        names = ", ".join(str(config.node.SEED + trial) for trial in failed)
        raise UserError(f"the trials with SEED {names} failed (see above), the others are finished: --resume goes on")
    print(_summary(folders))
