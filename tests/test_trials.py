"""Several trials at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, assert_user_error, tool
from test_train import assert_same_state

from mdistiller_norm.engine.checkpoint import load

CFG = "configs/digits/vanilla_resnet8.yaml"
SHORT = ["SOLVER.BATCH_SIZE", "480", "SOLVER.EPOCHS", "1"]


def test_each_trial_is_what_it_would_have_been_alone(tmp_path: Path) -> None:
    together = tool("train", "--cfg", CFG, *SHORT, "SOLVER.TRIALS", 2, "SEED", 3, "LOG.PREFIX", tmp_path)
    own = ["SEED", 4, "LOG.PREFIX", tmp_path, "EXPERIMENT.NAME", "alone"]
    tool("train", "--cfg", CFG, *SHORT, *own)
    folders = sorted(path for path in (tmp_path / "digits").iterdir() if "seed" in path.name)
    assert [folder.name[-5:] for folder in folders] == ["seed3", "seed4"]
    states = [load(folder / "latest.pt") for folder in (folders[1], tmp_path / "digits" / "alone")]
    assert_same_state(states[0]["trainable"], states[1]["trainable"])
    assert_same_state(states[0]["optimizer"], states[1]["optimizer"])
    top1 = [json.loads((folder / "result.json").read_text())["last"]["top1"] for folder in folders]
    assert f"last top-1 {sum(top1) / 2:.2f} +- " in together.stdout
    assert f"n=2: {top1[0]:.2f}, {top1[1]:.2f}" in together.stdout


def test_a_failing_trial_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "digits" / "run,seed1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("SEED: 1\n")  # it looks like a run that is there already
    overrides = [*SHORT, "SOLVER.TRIALS", 2, "EXPERIMENT.NAME", "run", "LOG.PREFIX", tmp_path]
    done = tool("train", "--cfg", CFG, *overrides, check=False)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert "the trials with SEED 1 failed" in done.stderr
    assert (tmp_path / "digits" / "run,seed0" / "result.json").exists()
    assert_user_error(tool("train", "--cfg", CFG, "SOLVER.TRIALS", 0, check=False), "SOLVER.TRIALS", "at least 1")


def test_stopping_stops_and_saves_all(tmp_path: Path) -> None:
    command = [sys.executable, "tools/train.py", "--cfg", CFG, "SOLVER.TRIALS", "2", "SOLVER.EPOCHS", "500"]
    command += ["SOLVER.BATCH_SIZE", "480", "EXPERIMENT.NAME", "run", "LOG.PREFIX", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    states = [tmp_path / "digits" / f"run,seed{seed}" / "latest.pt" for seed in (0, 1)]
    for _ in range(900):
        if all(state.exists() for state in states):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert all(load(state)["epoch"] >= 1 for state in states)
