"""Shared by the tests: where the real data is, and how the tools are run."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# One thread: the networks here are too small for two, and other processes may want the second core.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from short_runs import config

from mdistiller_norm.run import train

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
Once = Callable[[str, Callable[[Path], object]], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs but from tests that are asked for by ``-m cuda``: the others say what a run on the CPU does."""
    if not config.getoption("-m").startswith("cuda"):  # -m "not cuda" holds the word, too
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def unpacked(name: str, marker: str) -> Path:
    """The data folder with a data set in it, unpacked from beside the checkout where it is not there yet; or a skip."""
    root = Path(os.environ.get("MDISTILLER_NORM_DATA", ROOT / "data"))
    unpack = SHARED / "data" / "unpack.py"
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".unpacking").open("w") as lock:  # several test processes want it at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / marker).exists() and unpack.is_file():
            subprocess.run([sys.executable, str(unpack), str(root), name], check=True, capture_output=True)
    if not (root / marker).exists():
        pytest.skip(f"{name} is not in data/: get it, or say where it is with MDISTILLER_NORM_DATA")
    return root


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """The folder that holds the complete CIFAR-100, or a skip."""
    return unpacked("cifar100", "cifar-100-python/meta")


@pytest.fixture(scope="session")
def facts() -> Path:
    """The folder of facts about the reference, or a skip."""
    if not (SHARED / "facts").is_dir():
        pytest.skip("the facts about the reference are not beside this checkout")
    return SHARED / "facts"


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Gives a folder that is filled once, however many processes test: by the first to ask, while the others wait.

    No test may change what is in it.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which the processes share

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = base / f"once_{name}", base / f"once_{name}.done"
        with (base / f"once_{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def teacher(once: Once) -> str:
    """The override that names a teacher trained for three epochs."""
    settings = ("DISTILLER.STUDENT=resnet14", "SOLVER.BATCH_SIZE=64")
    folder = once("teacher", lambda folder: train(config(folder, "teacher", *settings, epochs=3)))
    return f"DISTILLER.TEACHER_WEIGHTS={folder / 'distill' / 'teacher' / 'student_last.pt'}"


@pytest.fixture(scope="session")
def run(once: Once) -> Path:
    """The folder of a finished run of one epoch: a plain resnet8 on the digits."""
    return once("run", lambda folder: train(config(folder, "run", epochs=1))) / "distill" / "run"


def tool(name: str, *arguments: object, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``tools/<name>.py`` as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line on stderr that holds all the words, exit code 2 and no traceback."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
