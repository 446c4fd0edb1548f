"""The shell scripts: no lint, and a mistake is said in one line."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch")])


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_have_no_lint() -> None:
    assert len(SCRIPTS) >= 8
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["imagenet.sh"], "which pair? r34_r18 or r50_mv1"),
        (["imagenet.sh", "r34"], "which pair? r34_r18 or r50_mv1"),
        (["imagenet.sh", "r34_r18"], "which method? one of: at.yaml crd.yaml"),
        (["imagenet.sh", "r34_r18", "normkd", "0"], "GPUS is 0: at least 1"),
        (["slurm/imagenet.sbatch"], "which config? for example configs/imagenet/r34_r18/normkd.yaml"),
        (["slurm/imagenet.sbatch", "normkt.yaml"], "there is no normkt.yaml"),
        (["slurm/imagenet.sbatch", "configs/imagenet/r34_r18/normkd.yaml"], "this is a Slurm job"),
        (["imagenet_r34_r18.sh", "normkt"], "there is no configs/imagenet/r34_r18/normkt.yaml"),
        (["imagenet_r50_mv1.sh", "normkt"], "there is no configs/imagenet/r50_mv1/normkt.yaml"),
    ],
)
def test_what_imagenets_scripts_lack_is_said(command: list[str], words: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / command[0], *command[1:]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
