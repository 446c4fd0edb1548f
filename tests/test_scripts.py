"""The shell scripts: lint, bad arguments, and the commands that they run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch")])


def run(command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    script = ["bash", *f"{ROOT}/scripts/{command}".split()]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_scripts_have_no_lint() -> None:
    check = ["shellcheck", *SCRIPTS] if shutil.which("shellcheck") else ["bash", "-n", *SCRIPTS]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("imagenet.sh", "PAIR must be r34_r18 or r50_mv1, got ''"),
        ("imagenet.sh r34", "PAIR must be r34_r18 or r50_mv1, got 'r34'"),
        ("imagenet.sh r34_r18", "METHOD is missing: choose one of at.yaml crd.yaml"),
        ("imagenet.sh r34_r18 normkd 0", "GPUS must be >= 1, got 0"),
        ("slurm/imagenet.sbatch", "CONFIG is missing"),
        ("slurm/imagenet.sbatch normkt.yaml", "normkt.yaml does not exist"),
        ("slurm/imagenet.sbatch configs/imagenet/r34_r18/normkd.yaml", "must run under Slurm"),
        ("imagenet_r34_r18.sh normkt", "configs/imagenet/r34_r18/normkt.yaml does not exist"),
        ("imagenet_r50_mv1.sh normkt", "configs/imagenet/r50_mv1/normkt.yaml does not exist"),
    ],
)
def test_bad_arguments(command: str, words: str) -> None:
    done = run(command)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_imagenet_script_starts_one_process_per_gpu(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    done = run("imagenet_r34_r18.sh normkd 4 SEED 1", path=str(tmp_path))
    assert "--nproc-per-node 4" in done.stdout
    assert done.stdout.endswith("tools/train.py --cfg configs/imagenet/r34_r18/normkd.yaml --resume SEED 1\n")
